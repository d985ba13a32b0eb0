"""Run one cell under supervision; what its child cannot record is recorded here."""

import sys
from pathlib import Path

from ballast.faults import told_in_one_line
from ballast.layout import Layout
from ballast.plan import row_of
from ballast.spares import keep_record, restore_record
from ballast.supervise import finish_cell

plan, cell = Path(snakemake.resources.plan), snakemake.wildcards.cell
layout = Layout(Path(snakemake.resources.root), Path("results"))
row = row_of(plan, cell) if snakemake.resources.remote else None

with told_in_one_line(cell), open(snakemake.log[0], "w", buffering=1) as log:
    if row and restore_record(row, layout):
        print(f"{cell}: finished before, its record is put back", file=log)
        sys.exit(0)
    code = finish_cell(
        plan=plan,
        cell=cell,
        layout=layout,
        attempt=snakemake.resources.attempt,
        retries=snakemake.resources.retries,
        log=log,
    )
    if row and code == 0:
        keep_record(row, layout)
sys.exit(code)
