# What a cell scores between the untouched base and its end; optional, no part of a run of the suite.
import json

from ballast.curves import curve_cells, points_of, settings_of


def curves_of(kind):
    """Input function: the curves of every cell that has one of this kind."""
    return lambda _: [f"{HOME}/curves/{c}.{kind}.json" for c in curve_cells(PLAN, kind)[0]]


def curve_settings(wildcards):
    """Checkpoints or alphas, and items, of a cell's curve."""
    spec = json.loads(PLAN.loc[wildcards.cell, "spec"])
    return settings_of(spec, wildcards.kind)


def curve_minutes(wildcards, attempt):
    """Minutes to ask a cluster for: a cell's for training, and as much for every point."""
    return cell_minutes(wildcards, attempt) * (1 + points_of(curve_settings(wildcards)))


rule curve:
    input:
        f"{HOME}/cells/{{cell}}/run.json",
    output:
        f"{HOME}/curves/{{cell}}.{{kind}}.json",
    log:
        f"{HOME}/logs/{{cell}}.{{kind}}.log",
    wildcard_constraints:
        kind="trajectory|rewind",
    conda:
        "../../envs/ballast.yaml"
    threads: 1
    resources:
        mem_mb=cell_memory,
        runtime=curve_minutes,
        attempt=attempt_number,
        plan=str(PLAN_FILE),
        root=str(ROOT),
    params:
        train=in_plan(PLAN, "train_key"),
        scores=in_plan(PLAN, "eval_key"),
        settings=curve_settings,
    script:
        "../scripts/curve.py"


# Cells trained once more, scored at checkpoints.
rule trajectories:
    input:
        curves_of("trajectory"),
    log:
        f"{HOME}/logs/trajectories.log",
    conda:
        "../../envs/ballast.yaml"
    resources:
        plan=str(PLAN_FILE),
    params:
        kind="trajectory",
    script:
        "../scripts/curves.py"


# Finished cells on the way back to their base.
rule rewind:
    input:
        curves_of("rewind"),
    log:
        f"{HOME}/logs/rewind.log",
    conda:
        "../../envs/ballast.yaml"
    resources:
        plan=str(PLAN_FILE),
    params:
        kind="rewind",
    script:
        "../scripts/curves.py"
