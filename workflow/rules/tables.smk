# Tables and figures, from the fields of records.
rule tables:
    input:
        records=records_of(PLAN, f"{HOME}/cells"),
    output:
        tables_of_suite(),
    log:
        f"{HOME}/logs/tables.log",
    conda:
        "../../envs/ballast.yaml"
    resources:
        plan=str(PLAN_FILE),
    params:
        cells=sorted(PLAN["id"]),
    script:
        "../scripts/tables.py"


# The same tables from the records that exist, whatever else is missing or stale: trains nothing.
rule leaderboard:
    log:
        f"{HOME}/logs/leaderboard.log",
    conda:
        "../../envs/ballast.yaml"
    resources:
        plan=str(PLAN_FILE),
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
    script:
        "../scripts/keep.py"
