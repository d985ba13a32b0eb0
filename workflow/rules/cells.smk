# A cell: one process trains, merges and scores it, and writes its record last.
# No input is ancient(): Snakemake does not look at the keys of a cell below a job that runs, and
# would leave it stale for one run. A cell that runs with its train key unchanged is only scored.
rule cell:
    input:
        base=base_of(PLAN),
        parents=parents_of,
    output:
        f"{HOME}/cells/{{cell}}/run.json",
    log:
        f"{HOME}/logs/{{cell}}.log",
    group:
        group_of(PLAN, "cells")
    conda:
        "../../envs/ballast.yaml"
    threads: cell_threads(PLAN)
    resources:
        mem_mb=cell_memory(PLAN),
        runtime=cell_minutes(PLAN),
        gpu=cell_gpus(PLAN),
        lane=1,
        attempt=attempt_number,
        retries=retries_allowed,
        remote=is_remote,
        plan=str(PLAN_FILE),
        root=str(ROOT),
    params:
        train=in_plan(PLAN, "train_key"),
        scores=in_plan(PLAN, "eval_key"),
    script:
        "../scripts/cell.py"
