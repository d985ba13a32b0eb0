"""Versions of what makes numbers: raised when numbers change, never otherwise.

A golden-number test fails when training or evaluation gives other numbers under the same version.
"""

TRAIN = 1  # training loop, adapters' common layers, data order, reading and tokenisation of data
EVALUATION = 2  # how tasks are scored, and what is stored of each item
RECORD = 1  # the format of run.json
