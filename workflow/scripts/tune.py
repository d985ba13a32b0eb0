"""Gather the cells of `tune` into the table of learning rates, what tuning gave, and its curves."""

from pathlib import Path

from ballast.faults import told_in_one_line
from ballast.files import write_sums
from ballast.orphans import end_with_run
from ballast.rates import read_rates
from ballast.records import read_path
from ballast.tune import write_rates, write_tuning
from ballast.tune_plot import write_curves

end_with_run()

with told_in_one_line("tune"):
    records = [read_path(Path(path)) for path in snakemake.input]
    table = Path(snakemake.output.table)
    chosen = write_rates(records, table)
    write_tuning(read_rates(table), Path(snakemake.output.tuning))
    write_curves(table, table.parent)
    write_sums(table.parent, [table])
    text = chosen.to_string(index=False)
    Path(snakemake.log[0]).write_text(text + "\n")
    print(text)
