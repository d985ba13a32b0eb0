# A base: pretrained, downloaded or imported; its data; its own untouched scores.
rule base:
    output:
        f"{HOME}/bases/{{base}}.json",
    log:
        f"{HOME}/logs/base.{{base}}.log",
    conda:
        "../../envs/ballast.yaml"
    threads: 1
    resources:
        mem_mb=base_memory,
        runtime=base_minutes,
        gpu=base_gpus,
        plan=str(PLAN_FILE),
        root=str(ROOT),
    params:
        made=base_keys,
        scored=base_scores_keys,
    script:
        "../scripts/base.py"


# Downloads alone, where there is a network, for compute nodes that have none.
rule fetch:
    log:
        f"{HOME}/logs/fetch.log",
    conda:
        "../../envs/ballast.yaml"
    resources:
        plan=str(PLAN_FILE),
        root=str(ROOT),
    script:
        "../scripts/fetch.py"
