# The plan of the suite and look-ups in it; nothing here imports torch or a method.
from pathlib import Path

import pandas as pd
from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from ballast.errors import BallastError
from ballast.layout import Layout
from ballast.status import make_plan_file, opening_text, closing_text

if not config:
    raise WorkflowError(
        "no suite: run from the folder of the Snakefile, or give --configfile config/SUITE.yaml"
    )

ROOT = Path(workflow.basedir)
RESULTS = Path("results")
SUITE_FILE = Path(workflow.configfiles[0]) if workflow.configfiles else ROOT / "config"

try:
    PLAN_FILE = make_plan_file(config, ROOT, RESULTS, SUITE_FILE.parent)
except BallastError as error:
    raise WorkflowError(str(error))

validate(config, str(ROOT / "workflow/schemas/suite.schema.yaml"), set_default=False)

SUITE = config["suite"]
HOME = f"results/{SUITE}"
PLAN = pd.read_parquet(PLAN_FILE).set_index("id", drop=False)
BASES = list(config["bases"])
TUNE = pd.read_parquet(PLAN_FILE.with_suffix(".tune.parquet")).set_index("id", drop=False)


wildcard_constraints:
    cell="[^/]+",
    base="[^/]+",


def in_plan(table, column):
    """Input function: a column of the plan's row of a cell."""
    return lambda wildcards: table.loc[wildcards.cell, column]


def base_of(table):
    """Input function: the ready base of a cell."""
    return lambda wildcards: f"{HOME}/bases/{table.loc[wildcards.cell, 'base']}.json"


def parents_of(wildcards):
    """Records of the cells that a post-hoc cell edits."""
    return [f"{HOME}/cells/{p}/run.json" for p in PLAN.loc[wildcards.cell, "parents"].split()]


def records_of(table, folder):
    """Records of all cells of a table."""
    return [f"{folder}/{cell}/run.json" for cell in table["id"]]


def tables_of_suite():
    """What a run of the suite ends with."""
    return [f"{HOME}/tables/{name}" for name in ("leaderboard.md", "cells.csv", "cells.parquet")] + [
        f"{HOME}/figures/{name}" for name in ("tradeoff.svg", "tradeoff.png")
    ]


def cell_memory(wildcards, attempt):
    """MiB for a cell: its limit, doubled by every retry."""
    return config.get("limits", {}).get("memory_mb", 4000) * 2 ** (attempt - 1)


def cell_minutes(wildcards, attempt):
    """Minutes for a cell: its limit, doubled by every retry."""
    return max(1, round(config.get("limits", {}).get("minutes", 10) * 2 ** (attempt - 1)))


def attempt_number(wildcards, attempt):
    return attempt


def retries_allowed(wildcards):
    settings = workflow.execution_settings
    return settings.retries if settings else 0


def opening():
    return opening_text(PLAN, Layout(ROOT, RESULTS), SUITE, workflow.cores or 1)


def closing():
    return closing_text(PLAN, Layout(ROOT, RESULTS), SUITE)
