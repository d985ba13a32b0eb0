# The plan of the suite and look-ups in it; nothing here imports torch or a method.
import json
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.utils import validate

from ballast.curves import curve_cells, settings_of
from ballast.damage import set_aside_damaged
from ballast.dates import without_future
from ballast.errors import BallastError
from ballast.escape import file_names
from ballast.faults import check_writable, fault_of
from ballast.layout import Layout
from ballast.orphans import announce_run
from ballast.plan import read_plan
from ballast.spares import drop_spares
from ballast.status import closing_text, make_plan_file, opening_text

if not config:
    raise WorkflowError(
        "no suite: run from the folder of the Snakefile, or give --configfile config/SUITE.yaml"
    )

announce_run()

ROOT = Path(workflow.basedir)
RESULTS = Path("results")
SUITE_FOLDER = Path(workflow.configfiles[0]).parent if workflow.configfiles else ROOT / "config"

try:
    PLAN_FILE = make_plan_file(config, ROOT, RESULTS, SUITE_FOLDER)
    if workflow.is_main_process and not workflow.dryrun:
        check_writable(RESULTS / config["suite"])
except (BallastError, OSError) as error:
    raise WorkflowError(fault_of(error, RESULTS) or str(error))

validate(config, str(ROOT / "workflow/schemas/suite.schema.yaml"), set_default=False)

SUITE = config["suite"]
HOME = f"results/{SUITE}"
PLAN = read_plan(PLAN_FILE)
TUNE = read_plan(PLAN_FILE.with_suffix(".tune.parquet"))
# The table of learning rates that the suite names, if it does.
RATES = "learning_rates" in config and str(SUITE_FOLDER / config["learning_rates"])
PLACES = file_names(sorted(set(zip(PLAN["base"], PLAN["target"]))))
# Name of a figure of each base and target, its caption in workflow/report/, and its heading there.
FIGURES = {"ranks": "Rank sweep", "difference": "Mean ranks", "forgetting": "Forgetting"}


# Jobs that Snakemake starts read this file too; they find things as this process left them.
if workflow.is_main_process:
    for line in set_aside_damaged(PLAN, TUNE, Layout(ROOT, RESULTS), SUITE):
        print(line, file=sys.stderr)
    without_future(Path(HOME))


wildcard_constraints:
    cell="[^/]+",
    base="[^/]+",


def row_of(table, cell):
    """A cell's row as a dictionary: a table's own look-up is many times slower."""
    if id(table) not in ROWS:
        ROWS[id(table)] = table.to_dict("index")
    return ROWS[id(table)][cell]


# Rows by table and cell.
ROWS = {}


def in_plan(table, column):
    """Input function: a column of the plan's row of a cell."""
    return lambda wildcards: row_of(table, wildcards.cell)[column]


def base_of(table):
    """Input function: the ready base of a cell."""

    def ready(wildcards):
        share_submission()
        return f"{HOME}/bases/{row_of(table, wildcards.cell)['base']}.json"

    return ready


def record_of(wildcards):
    """Input function: the record of a cell."""
    share_submission()
    return f"{HOME}/cells/{wildcards.cell}/run.json"


def parents_of(wildcards):
    """Records of the cells that a post-hoc cell edits."""
    return [f"{HOME}/cells/{p}/run.json" for p in row_of(PLAN, wildcards.cell)["parents"].split()]


def records_of(table, folder):
    """Records of all cells of a table."""
    return [f"{folder}/{cell}/run.json" for cell in table["id"]]


def tables_of_suite():
    """What a run of the suite ends with; .complete is missing beside tables with stale cells."""
    tables = ["leaderboard.md", "cells.csv", "cells.parquet", "tables.tex", ".complete"]
    tables += [f"{name}.md" for name in PLACES.values()]
    return [
        *(f"{HOME}/tables/{name}" for name in tables),
        *(f"{HOME}/figures/tradeoff.{kind}" for kind in ("svg", "pdf", "png")),
        *(
            f"{HOME}/figures/{figure}-{name}.{kind}"
            for name in PLACES.values()
            for figure in FIGURES
            for kind in ("svg", "pdf")
        ),
    ]


def in_report(path):
    """A table or figure with its caption and category, if `snakemake --report` shows it."""
    name = Path(path).stem
    if path.endswith("tables/leaderboard.md"):
        return report(path, caption="../report/leaderboard.rst", category="Leaderboard")
    if path.endswith("figures/tradeoff.svg"):
        return report(path, caption="../report/tradeoff.rst", category="Trade-off")
    for (base, target), place in PLACES.items():
        labels = {"base": base, "target": target}
        if path.endswith(f"tables/{place}.md"):
            caption = "../report/tables.rst"
            return report(path, caption=caption, category="Tables", labels=labels)
        for figure, category in FIGURES.items():
            if path.endswith(f"figures/{figure}-{place}.svg"):
                caption = f"../report/{figure}.rst"
                return report(path, caption=caption, category=category, labels=labels)
    return path


def curves_of(kind):
    """Input function: the curves of every cell that has one of this kind."""
    return lambda _: [f"{HOME}/curves/{c}.{kind}.json" for c in curve_cells(PLAN, kind)[0]]


def curve_settings(wildcards):
    """Checkpoints or alphas, and items, of a cell's curve."""
    spec = json.loads(row_of(PLAN, wildcards.cell)["spec"])
    return settings_of(spec, wildcards.kind)


def base_keys(wildcards):
    """Keys of what a base's readiness depends on."""
    return PLAN.loc[PLAN["base"] == wildcards.base, ["base_key", "data_key"]].iloc[0].tolist()


def base_scores_keys(wildcards):
    """Keys of how a base's own scores are made."""
    return sorted(PLAN.loc[PLAN["base"] == wildcards.base, "eval_key"].unique())


def side_by_side():
    """How many cells run at a time at most: a job has a core here, a submission elsewhere."""
    return workflow.cores if workflow.local_exec else workflow.resource_settings.nodes


def opening():
    # Elsewhere every submission has the GPUs that it asks for.
    gpus = None if workflow.local_exec else side_by_side()
    return opening_text(PLAN, Layout(ROOT, RESULTS), SUITE, side_by_side(), gpus)


def closing():
    return closing_text(PLAN, Layout(ROOT, RESULTS), SUITE)
