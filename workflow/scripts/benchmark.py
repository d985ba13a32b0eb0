"""Measure the price of each method's step, and sum up where the run's time went."""

from pathlib import Path

import torch

from ballast.benchmark import Settings, write_benchmark
from ballast.declare import discover
from ballast.faults import told_in_one_line
from ballast.layout import Layout
from ballast.orphans import end_with_run
from ballast.records import scan

end_with_run()

with told_in_one_line("benchmark"):
    layout = Layout(Path(snakemake.resources.root), Path("results"))
    torch.set_num_threads(snakemake.threads)
    records, _ = scan(layout.suite(snakemake.config["suite"]) / "cells")
    with open(snakemake.log[0], "w", buffering=1) as log:
        write_benchmark(
            discover(layout.methods),
            records,
            Path(snakemake.output.steps).parent,
            Settings.of(snakemake.config.get("benchmark", {})),
            report=lambda line: print(line, file=log),
        )
    print((Path(snakemake.output.steps).parent / "benchmark.md").read_text())
