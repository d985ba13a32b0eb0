# The plan of the suite and look-ups in it; nothing here imports torch or a method.
import math
from pathlib import Path

import pandas as pd
from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from ballast.errors import BallastError
from ballast.layout import Layout
from ballast.status import closing_text, make_plan_file, opening_text
from ballast.suite import LIMITS

if not config:
    raise WorkflowError(
        "no suite: run from the folder of the Snakefile, or give --configfile config/SUITE.yaml"
    )

ROOT = Path(workflow.basedir)
RESULTS = Path("results")
SUITE_FOLDER = Path(workflow.configfiles[0]).parent if workflow.configfiles else ROOT / "config"

try:
    PLAN_FILE = make_plan_file(config, ROOT, RESULTS, SUITE_FOLDER)
except BallastError as error:
    raise WorkflowError(str(error))

validate(config, str(ROOT / "workflow/schemas/suite.schema.yaml"), set_default=False)

SUITE = config["suite"]
HOME = f"results/{SUITE}"
PLAN = pd.read_parquet(PLAN_FILE).set_index("id", drop=False)
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


def base_keys(wildcards):
    """Keys of what a base's readiness depends on."""
    return PLAN.loc[PLAN["base"] == wildcards.base, ["base_key", "data_key"]].iloc[0].tolist()


def base_scores_keys(wildcards):
    """Keys of how a base's own scores are made."""
    return sorted(PLAN.loc[PLAN["base"] == wildcards.base, "eval_key"].unique())


def cell_memory(wildcards, attempt):
    """MiB to ask a cluster for: a cell's limit, doubled by every retry, and Snakemake's own part."""
    return (LIMITS | config.get("limits", {}))["memory_mb"] * 2 ** (attempt - 1) + 1000


def cell_minutes(wildcards, attempt):
    """Minutes to ask a cluster for: the supervisor must meet the cell's limit before it does."""
    return math.ceil((LIMITS | config.get("limits", {}))["minutes"] * 2 ** (attempt - 1)) + 2


def attempt_number(wildcards, attempt):
    """Which try of a job this is, from 1."""
    return attempt


def retries_allowed(wildcards):
    """How often Snakemake tries a failed job again."""
    settings = workflow.execution_settings
    return settings.retries if settings else 0


def opening():
    return opening_text(PLAN, Layout(ROOT, RESULTS), SUITE, workflow.cores or 1)


def closing():
    return closing_text(PLAN, Layout(ROOT, RESULTS), SUITE)
