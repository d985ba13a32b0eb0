"""Write a suite's tables and figures from the records that exist."""

from pathlib import Path

from ballast.plan import read_plan
from ballast.plots import write_scatter
from ballast.records import scan
from ballast.tables import tidy, write_tables

home = Path("results") / snakemake.config["suite"]
records, problems = scan(home / "cells")
plan = read_plan(Path(snakemake.resources.plan))
write_tables(records, plan, home / "tables")
write_scatter(tidy(records, plan), home / "figures")
Path(snakemake.log[0]).write_text("\n".join([f"{len(records)} records", *problems]) + "\n")
