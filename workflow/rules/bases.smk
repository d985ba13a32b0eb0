# A base: pretrained, downloaded or imported; its data; its own untouched scores.


def base_keys(wildcards):
    """Keys of what a base's readiness depends on."""
    return PLAN.loc[PLAN["base"] == wildcards.base, ["base_key", "data_key"]].iloc[0].tolist()


def base_scores_key(wildcards):
    """Keys of how a base's own scores are made."""
    return sorted(PLAN.loc[PLAN["base"] == wildcards.base, "eval_key"].unique())


rule base:
    output:
        f"{HOME}/bases/{{base}}.json",
    params:
        plan=str(PLAN_FILE),
        made=base_keys,
        scored=base_scores_key,
        root=str(ROOT),
        name=lambda wildcards: wildcards.base,
    log:
        f"{HOME}/logs/base.{{base}}.log",
    threads: 1
    resources:
        mem_mb=4000,
        runtime=30,
    script:
        "../scripts/base.py"
