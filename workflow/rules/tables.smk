# Tables and figures, from the fields of records.
rule tables:
    input:
        records=records_of(PLAN, f"{HOME}/cells"),
    output:
        tables_of_suite(),
    params:
        cells=sorted(PLAN["id"]),
    log:
        f"{HOME}/logs/tables.log",
    resources:
        plan=str(PLAN_FILE),
    script:
        "../scripts/tables.py"


# The same tables from the records that exist, whatever else is missing or stale: trains nothing.
rule leaderboard:
    log:
        f"{HOME}/logs/leaderboard.log",
    resources:
        plan=str(PLAN_FILE),
    script:
        "../scripts/tables.py"
