"""Write a suite's tables and figures from the records that exist."""

from pathlib import Path

from ballast.figures.output import write_figures
from ballast.layout import Layout
from ballast.output import places_of, write_tables
from ballast.plan import read_plan
from ballast.results import read_results

suite = snakemake.config["suite"]
results = read_results(Layout.here(), suite, read_plan(Path(snakemake.resources.plan)))
places = places_of(results)
write_tables(results, results.folder / "tables", places, snakemake.params.protocol)
write_figures(places, results.folder / "figures")
# Without this mark the next run makes the tables again, even if a stale cell's file is put back.
mark = results.folder / "tables" / ".complete"
if snakemake.output:
    mark.touch()
elif not results.table["status"].isin(["ok", "failed", "unplanned"]).all():
    mark.unlink(missing_ok=True)
lines = [f"{len(results.records)} records", *results.problems]
Path(snakemake.log[0]).write_text("\n".join(lines) + "\n")
