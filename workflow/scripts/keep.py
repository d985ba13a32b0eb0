"""Keep a suite's records and item scores under results/kept/."""

import sys
from pathlib import Path

from ballast.faults import told_in_one_line
from ballast.keep import keep_suite
from ballast.orphans import end_with_run

end_with_run()

folder = Path(snakemake.params.folder)
rates = snakemake.params.rates and Path(snakemake.params.rates)
with told_in_one_line("keep"):
    line = f"{folder}: {keep_suite(Path(snakemake.params.suite), folder, rates)} records kept"
    Path(snakemake.log[0]).write_text(line + "\n")
    print(line, file=sys.stderr)
