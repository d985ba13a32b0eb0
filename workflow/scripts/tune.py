"""Gather the cells of `tune` into the table of learning rates and its curves."""

from pathlib import Path

from ballast.records import read_path
from ballast.tune import write_rates
from ballast.tune_plot import write_curves

records = [read_path(Path(path)) for path in snakemake.input]
chosen = write_rates(records, Path(snakemake.output.table))
write_curves(Path(snakemake.output.table), Path(snakemake.output.curves).parent)
text = chosen.to_string(index=False)
Path(snakemake.log[0]).write_text(text + "\n")
print(text)
