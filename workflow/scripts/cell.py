"""Run one cell under supervision; what its child cannot record is recorded here."""

import sys
from pathlib import Path

from ballast.faults import told_in_one_line
from ballast.layout import Layout
from ballast.supervise import finish_cell

with told_in_one_line(snakemake.wildcards.cell), open(snakemake.log[0], "w", buffering=1) as log:
    code = finish_cell(
        plan=Path(snakemake.resources.plan),
        cell=snakemake.wildcards.cell,
        layout=Layout(Path(snakemake.resources.root), Path("results")),
        attempt=snakemake.resources.attempt,
        retries=snakemake.resources.retries,
        log=log,
    )
sys.exit(code)
