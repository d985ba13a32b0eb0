"""Write a suite's leaderboard page and its cells' pages."""

from pathlib import Path

from ballast.layout import Layout
from ballast.plan import read_plan
from ballast.report import write_pages
from ballast.results import read_results
from ballast.tables.output import places_of

suite = snakemake.config["suite"]
plan, rates = read_plan(Path(snakemake.resources.plan)), snakemake.params.rates
results = read_results(Layout.here(), suite, plan, rates and Path(rates))
places = places_of(results)
pages = write_pages(results, places, snakemake.params.protocol)
lines = [f"{len(pages)} pages", *results.problems]
Path(snakemake.log[0]).write_text("\n".join(lines) + "\n")
