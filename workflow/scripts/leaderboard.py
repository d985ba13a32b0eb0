"""Write everything that is made from a suite's records: tables, figures and pages."""

from pathlib import Path

from ballast.faults import told_in_one_line
from ballast.layout import Layout
from ballast.locks import held
from ballast.orphans import end_with_run
from ballast.outcome import MADE_OF_RECORDS
from ballast.plan import read_plan
from ballast.report import write_pages, write_tables_and_figures
from ballast.results import read_results
from ballast.tables.output import places_of

end_with_run()

suite = snakemake.config["suite"]
layout = Layout.here()
home = layout.suite(suite)
with (
    told_in_one_line("leaderboard"),
    held(home, "tables", name=MADE_OF_RECORDS["tables"]),
    held(home, "site", name=MADE_OF_RECORDS["leaderboard"]),
):
    plan, rates = read_plan(Path(snakemake.resources.plan)), snakemake.params.rates
    results = read_results(layout, suite, plan, rates and Path(rates))
    places = places_of(results)
    write_tables_and_figures(results, places, snakemake.params.protocol)
    pages = write_pages(results, places, snakemake.params.protocol)
    lines = [f"{len(results.records)} records, {len(pages)} pages", *results.problems]
    Path(snakemake.log[0]).write_text("\n".join(lines) + "\n")
