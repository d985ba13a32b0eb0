"""Download what a suite needs from the hub."""

import sys
from pathlib import Path

from ballast.faults import told_in_one_line
from ballast.fetch import fetch
from ballast.layout import Layout
from ballast.orphans import end_with_run
from ballast.plan import read_plan

end_with_run()

layout = Layout(Path(snakemake.resources.root), Path("results"))
with told_in_one_line("fetch"), open(snakemake.log[0], "w", buffering=1) as log:

    def report(line: str) -> None:
        print(line, file=log)
        print(line, file=sys.stderr, flush=True)

    count = fetch(read_plan(Path(snakemake.resources.plan)), layout, report)
    report(f"{count} bases and data sets of the hub are here")
