"""Before anything starts: what a suite costs in time, memory and disk.

Shapes come from a base's configuration (`architecture`, `bases`); operations (`flops`), memory and
disk follow from them (`need`), and finished cells set them right (`calibrate`). `suite` puts a
suite's cells together. Nothing here imports torch.
"""
