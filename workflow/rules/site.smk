# The leaderboard's page, and a page for each cell.
rule site:
    input:
        records=records_of(PLAN, f"{HOME}/cells"),
    output:
        f"{HOME}/leaderboard/index.html",
        # Missing beside pages with stale cells.
        f"{HOME}/leaderboard/.complete",
    log:
        f"{HOME}/logs/site.log",
    conda:
        "../../envs/ballast.yaml"
    resources:
        plan=str(PLAN_FILE),
    params:
        cells=sorted(PLAN["id"]),
        protocol=config.get("protocol"),
        rates=RATES,
    script:
        "../scripts/site.py"


# Tables, figures and pages from the records that exist, whatever else is missing or stale: trains
# nothing.
rule leaderboard:
    log:
        f"{HOME}/logs/leaderboard.log",
    conda:
        "../../envs/ballast.yaml"
    resources:
        plan=str(PLAN_FILE),
    params:
        protocol=config.get("protocol"),
        rates=RATES,
    script:
        "../scripts/leaderboard.py"
