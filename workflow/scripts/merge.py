"""Merge bundles from other machines beside a suite's own results."""

import sys
from pathlib import Path

from ballast.community import INCOMING, merge
from ballast.faults import told_in_one_line
from ballast.orphans import end_with_run

end_with_run()

home = Path(snakemake.params.suite)
with told_in_one_line("merge"):
    report = merge(home / INCOMING, home)
    text = "\n".join(report.lines()) + "\n"
    Path(snakemake.log[0]).write_text(text, encoding="utf-8")
    print(text, end="", file=sys.stderr)
    sys.exit(bool(report.refused))
