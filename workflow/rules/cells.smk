# A cell: one process trains, merges and scores it, and writes its record last.
rule cell:
    input:
        base=ancient(base_of(PLAN)),
        parents=ancient(parents_of),
    output:
        f"{HOME}/cells/{{cell}}/run.json",
    params:
        train=in_plan(PLAN, "train_key"),
        scores=in_plan(PLAN, "eval_key"),
    log:
        f"{HOME}/logs/{{cell}}.log",
    threads: 1
    resources:
        mem_mb=cell_memory,
        runtime=cell_minutes,
        attempt=attempt_number,
        retries=retries_allowed,
        plan=str(PLAN_FILE),
        root=str(ROOT),
    script:
        "../scripts/cell.py"
