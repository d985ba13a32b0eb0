"""Write a suite's leaderboard page and its cells' pages."""

from pathlib import Path

from ballast.faults import told_in_one_line
from ballast.layout import Layout
from ballast.locks import held
from ballast.orphans import end_with_run
from ballast.outcome import MADE_OF_RECORDS
from ballast.plan import read_plan
from ballast.report import write_pages
from ballast.results import read_results
from ballast.tables.output import places_of

end_with_run()

suite = snakemake.config["suite"]
layout = Layout.here()
home = layout.suite(suite)
with told_in_one_line("pages"), held(home, "site", name=MADE_OF_RECORDS["leaderboard"]):
    plan, rates = read_plan(Path(snakemake.resources.plan)), snakemake.params.rates
    results = read_results(layout, suite, plan, rates and Path(rates))
    places = places_of(results)
    pages = write_pages(results, places, snakemake.params.protocol, complete=True)
    lines = [f"{len(pages)} pages", *results.problems]
    Path(snakemake.log[0]).write_text("\n".join(lines) + "\n")
