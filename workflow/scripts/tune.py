"""Gather the cells of `tune` into the table of learning rates, what tuning gave, and its curves."""

from pathlib import Path

from ballast.files import write_text
from ballast.rates import read_rates, tuning_table
from ballast.records import read_path
from ballast.tables import to_csv
from ballast.tune import write_rates
from ballast.tune_plot import write_curves

records = [read_path(Path(path)) for path in snakemake.input]
table = Path(snakemake.output.table)
chosen = write_rates(records, table)
write_text(Path(snakemake.output.tuning), to_csv(tuning_table(read_rates(table))))
write_curves(table, table.parent)
text = chosen.to_string(index=False)
Path(snakemake.log[0]).write_text(text + "\n")
print(text)
