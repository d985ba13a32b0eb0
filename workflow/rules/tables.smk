# Tables and figures, from the fields of records.
# The files of a finished suite: the last step of a run.
rule summarise:
    input:
        records=records_of(PLAN, f"{HOME}/cells"),
    output:
        [in_report(path) for path in tables_of_suite()],
    log:
        f"{HOME}/logs/tables.log",
    conda:
        "../../envs/ballast.yaml"
    resources:
        plan=str(PLAN_FILE),
    params:
        cells=sorted(PLAN["id"]),
        protocol=config.get("protocol"),
        rates=RATES,
    script:
        "../scripts/tables.py"


# The same tables and figures from the records that exist, whatever else is missing or stale: trains
# nothing.
rule tables:
    log:
        f"{HOME}/logs/tables-now.log",
    conda:
        "../../envs/ballast.yaml"
    resources:
        plan=str(PLAN_FILE),
    params:
        protocol=config.get("protocol"),
        rates=RATES,
    script:
        "../scripts/tables.py"


# Records and item scores of the suite as two small files that can be committed: trains nothing.
rule keep:
    log:
        f"{HOME}/logs/keep.log",
    conda:
        "../../envs/ballast.yaml"
    params:
        suite=HOME,
        folder=f"results/kept/{SUITE}",
        rates=RATES,
    script:
        "../scripts/keep.py"
