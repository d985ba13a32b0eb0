"""Write a suite's leaderboard page and its cells' pages from the records that exist."""

from pathlib import Path

from ballast.layout import Layout
from ballast.plan import read_plan
from ballast.results import read_results
from ballast.site import write_site
from ballast.statistics.analysis import analyse

suite = snakemake.config["suite"]
results = read_results(Layout.here(), suite, read_plan(Path(snakemake.resources.plan)))
analyses = {place: analyse(results, *place) for place in results.places()}
folder = results.folder / "leaderboard"
pages = write_site(results, analyses, folder, snakemake.params.protocol)
lines = [f"{len(pages)} pages in {folder}", *results.problems]
Path(snakemake.log[0]).write_text("\n".join(lines) + "\n")
