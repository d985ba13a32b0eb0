"""Say what curves of a kind there are, and which methods cannot have one."""

import sys
from pathlib import Path

from ballast.curves import curve_cells, read_curves
from ballast.faults import told_in_one_line
from ballast.orphans import end_with_run
from ballast.plan import read_plan
from ballast.records import scan

end_with_run()

with told_in_one_line("curves"):
    home, kind = Path("results") / snakemake.config["suite"], snakemake.params.kind
    curves = read_curves(home, scan(home / "cells")[0])
    made = curves.loc[curves["kind"] == kind, "cell"].nunique()
    _, left = curve_cells(read_plan(Path(snakemake.resources.plan)), kind)
    lines = [f"{home / 'curves'}: {kind} of {made} cells", *curves.attrs["problems"]]
    lines += [f"left out: {reason}" for reason in left.values()]
    Path(snakemake.log[0]).write_text("\n".join(lines) + "\n")
    print(*lines, sep="\n", file=sys.stderr)
