# What a job asks of the machine that it runs on, and how jobs are submitted where an executor sends
# them elsewhere: with their limits, grouped if small, resubmitted with more.
import math
import os

from ballast.curves import points_of
from ballast.limits import limits_at

# Beyond the limits that the supervisor watches a submission holds two Snakemakes and the
# supervisor (MB), and starts them, and the interpreter, from a network file system (minutes).
OWN_MB, OWN_MINUTES = 1000, 3
# A cell is small if its minutes are at most these: several of them share a submission.
SMALL_MINUTES = 15
# Snakemake tells a job that it sends away of no retries: their number goes with the environment.
RETRIES = "BALLAST_RETRIES"
os.environ.setdefault(RETRIES, "0")


envvars:
    RETRIES,


# One at a time in a submission: the profile sets `lane` to 1.
resource_scopes:
    lane="local",


# Seconds of one core, from records that are there: not worth a place in the queue.
localrules:
    fetch,
    summarise,
    site,
    leaderboard,
    tables,
    keep,
    merge,
    trajectories,
    rewind,
    tune,


def attempt_number(wildcards, attempt):
    """Which try of a job this is, from 1."""
    return attempt


def retries_here():
    """How often this Snakemake tries a failed job again."""
    return workflow.execution_settings.retries if workflow.execution_settings else 0


def retries_allowed(wildcards):
    """How often a failed job is tried again, wherever it runs."""
    return int(os.environ[RETRIES]) if workflow.remote_exec else retries_here()


def is_remote(wildcards):
    """1 in a job that an executor sent elsewhere, 0 on the machine where Snakemake was started."""
    return int(workflow.remote_exec)


def share_submission():
    """Settings of the Snakemake within a submission, to which its starter gives none.

    A cell that fails must not keep the others of its group from running, and together they have
    the CPUs that were asked for, not all that the node has. Input functions call this, because
    they are looked up before anything is scheduled, and the Snakefile is read too early.
    """
    if workflow.remote_exec and workflow.execution_settings:
        workflow.execution_settings.keep_going = True
        asked = int(os.environ.get("SLURM_CPUS_PER_TASK", workflow.cores))
        workflow.global_resources["_cores"] = min(workflow.cores, asked)


def all_cores(wildcards):
    """CPUs of a job that must be alone on a machine to be measured: all here, one elsewhere."""
    return workflow.cores if workflow.local_exec else 1


def spec_of(table, wildcards):
    """Limits and training settings of a cell of a table; parsed once, for each job asks often."""
    return spec_of_cell(table, wildcards.cell)


def spec_of_cell(table, cell):
    """As `spec_of`, by the cell's id."""
    asked = ASKED.setdefault(id(table), {})
    if cell not in asked:
        spec = json.loads(row_of(table, cell)["spec"])
        asked[cell] = {"limits": spec["limits"], "training": spec["training"]}
    return asked[cell]


# By table and cell: what `spec_of` has parsed.
ASKED = {}


def base_limits_of(wildcards):
    """Limits of making a base ready."""
    return json.loads(PLAN.loc[PLAN["base"] == wildcards.base, "spec"].iloc[0])["base_limits"]


def memory_to_ask(limits, attempt):
    """MB of a submission; SLURM takes them for MiB, which is a little more."""
    return math.ceil(limits_at(limits, attempt)[1]) + OWN_MB


def minutes_to_ask(limits, attempt, times=1):
    """Minutes of a submission: the supervisor meets the limit before the cluster does."""
    return math.ceil(limits_at(limits, attempt)[0] * times) + OWN_MINUTES


def cell_memory(table):
    """Resource: memory of a cell."""
    return lambda wildcards, attempt: memory_to_ask(spec_of(table, wildcards)["limits"], attempt)


def cell_minutes(table):
    """Resource: time of a cell."""
    return lambda wildcards, attempt: minutes_to_ask(spec_of(table, wildcards)["limits"], attempt)


def curve_minutes(wildcards, attempt):
    """Resource: time of a curve, a cell's for training and as much for every point."""
    points = 1 + points_of(curve_settings(wildcards))
    return minutes_to_ask(spec_of(PLAN, wildcards)["limits"], attempt, points)


def cell_gpus(table):
    """Resource: GPUs of a cell."""
    return lambda wildcards: spec_of(table, wildcards)["limits"]["gpus"]


def cell_threads(table):
    """CPUs of a cell: what its training uses."""
    return lambda wildcards: spec_of(table, wildcards)["training"]["threads"]


def base_memory(wildcards, attempt):
    """Resource: memory of making a base ready."""
    return memory_to_ask(base_limits_of(wildcards), attempt)


def base_minutes(wildcards, attempt):
    """Resource: time of making a base ready."""
    return minutes_to_ask(base_limits_of(wildcards), attempt)


def base_gpus(wildcards):
    """Resource: GPUs of making a base ready."""
    return base_limits_of(wildcards)["gpus"]


def is_small(table, cell):
    """Whether a cell shares a submission with others: it is small, and so are its parents."""
    family = [cell, *row_of(table, cell)["parents"].split()]
    minutes = [spec_of_cell(table, each)["limits"]["minutes"] for each in family]
    return max(minutes) <= SMALL_MINUTES


def group_of(table, kind):
    """Group: the small cells of one base; None for a large cell, which is submitted alone.

    A group waits for the inputs of all its members, so no group has members of two bases.
    """

    def group(wildcards):
        if not is_small(table, wildcards.cell):
            return None
        name = f"{row_of(table, wildcards.cell)['base']}-{kind}"
        # What `group: "{base}"` would do: group-components of the profile are looked up by "small".
        workflow.parent_groupids[name] = "small"
        return name

    return group


def check_arrays():
    """Raise if the cells of an array would differ: all its tasks get what the first asks for."""
    if not getattr(workflow.executor_settings, "array_jobs", None):
        return
    specs = [spec_of_cell(PLAN, cell) for cell in PLAN["id"] if not is_small(PLAN, cell)]
    asked = {(*spec["limits"].values(), spec["training"]["threads"]) for spec in specs}
    if len(asked) > 1:
        raise WorkflowError(
            "slurm-array-jobs: the tasks of an array all get the time, memory and GPUs of its first "
            f"one, and the large cells of this suite ask for {len(asked)} different things; leave "
            "it out, or give the suite `limits:`"
        )
