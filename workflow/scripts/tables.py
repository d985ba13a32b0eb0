"""Write a suite's tables and figures from the records that exist."""

from pathlib import Path

from ballast.plan import read_plan
from ballast.plots import write_scatter
from ballast.records import scan
from ballast.tables import tidy, write_tables

home = Path("results") / snakemake.config["suite"]
records, problems = scan(home / "cells")
plan = read_plan(Path(snakemake.resources.plan))
table = tidy(records, plan)
write_tables(records, plan, home / "tables")
write_scatter(table, home / "figures")
# Without this mark the next run makes the tables again, even if a stale cell's file is put back.
mark = home / "tables" / ".complete"
if snakemake.output:
    mark.touch()
elif not table["status"].isin(["ok", "failed", "unplanned"]).all():
    mark.unlink(missing_ok=True)
Path(snakemake.log[0]).write_text("\n".join([f"{len(records)} records", *problems]) + "\n")
