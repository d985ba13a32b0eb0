"""Write a suite's tables and figures from the records that exist."""

from pathlib import Path

from ballast.faults import told_in_one_line
from ballast.layout import Layout
from ballast.locks import held
from ballast.orphans import end_with_run
from ballast.outcome import MADE_OF_RECORDS
from ballast.plan import read_plan
from ballast.report import write_tables_and_figures
from ballast.results import read_results
from ballast.tables.output import places_of

end_with_run()

suite = snakemake.config["suite"]
layout = Layout.here()
home = layout.suite(suite)
with told_in_one_line("tables"), held(home, "tables", name=MADE_OF_RECORDS["tables"]):
    plan, rates = read_plan(Path(snakemake.resources.plan)), snakemake.params.rates
    results = read_results(layout, suite, plan, rates and Path(rates))
    places = places_of(results)
    write_tables_and_figures(
        results, places, snakemake.params.protocol, complete=bool(snakemake.output)
    )
    lines = [f"{len(results.records)} records", *results.problems]
    Path(snakemake.log[0]).write_text("\n".join(lines) + "\n")
