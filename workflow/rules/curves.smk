# What a cell scores between the untouched base and its end; optional, no part of a run of the suite.
rule curve:
    input:
        record_of,
    output:
        f"{HOME}/curves/{{cell}}.{{kind}}.json",
    log:
        f"{HOME}/logs/{{cell}}.{{kind}}.log",
    wildcard_constraints:
        kind="trajectory|rewind",
    group:
        group_of(PLAN, "curves")
    conda:
        "../../envs/ballast.yaml"
    threads: cell_threads(PLAN)
    resources:
        mem_mb=cell_memory(PLAN),
        runtime=curve_minutes,
        gpu=cell_gpus(PLAN),
        lane=1,
        attempt=attempt_number,
        remote=is_remote,
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
