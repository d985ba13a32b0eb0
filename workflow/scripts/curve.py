"""Make one curve of a cell under supervision."""

import sys
from pathlib import Path

from ballast.curves.curve_job import finish_curve
from ballast.faults import told_in_one_line
from ballast.layout import Layout
from ballast.spares import keep, restore

if snakemake.resources.remote:
    restore(Path(snakemake.output[0]))  # left alone if it is current
with told_in_one_line(snakemake.wildcards.cell), open(snakemake.log[0], "w", buffering=1) as log:
    code = finish_curve(
        plan=Path(snakemake.resources.plan),
        cell=snakemake.wildcards.cell,
        kind=snakemake.wildcards.kind,
        layout=Layout(Path(snakemake.resources.root), Path("results")),
        attempt=snakemake.resources.attempt,
        log=log,
    )
if snakemake.resources.remote and code == 0:
    keep(Path(snakemake.output[0]))
sys.exit(code)
