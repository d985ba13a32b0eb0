# Learning rates, found on validation items and committed with their curves.
rule tune_cell:
    input:
        base=base_of(TUNE),
    output:
        f"{HOME}/tune/cells/{{cell}}/run.json",
    log:
        f"{HOME}/tune/logs/{{cell}}.log",
    group:
        group_of(TUNE, "tune")
    conda:
        "../../envs/ballast.yaml"
    threads: cell_threads(TUNE)
    resources:
        mem_mb=cell_memory(TUNE),
        runtime=cell_minutes(TUNE),
        gpu=cell_gpus(TUNE),
        lane=1,
        attempt=attempt_number,
        retries=retries_allowed,
        remote=is_remote,
        plan=str(PLAN_FILE.with_suffix(".tune.parquet")),
        root=str(ROOT),
    params:
        train=in_plan(TUNE, "train_key"),
        scores=in_plan(TUNE, "eval_key"),
    script:
        "../scripts/cell.py"


rule tune:
    input:
        records_of(TUNE, f"{HOME}/tune/cells"),
    output:
        table=f"{HOME}/tune/learning_rates.csv",
        tuning=f"{HOME}/tune/tuning.csv",
        curves=f"{HOME}/tune/curves.svg",
        picture=f"{HOME}/tune/curves.png",
    log:
        f"{HOME}/tune/logs/tune.log",
    conda:
        "../../envs/ballast.yaml"
    script:
        "../scripts/tune.py"
