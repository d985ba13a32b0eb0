# Tables and figures, from the fields of records.
from ballast.escape import file_names

PLACES = file_names(sorted(set(zip(PLAN["base"], PLAN["target"]))))
# Name of a figure of each base and target, its caption in workflow/report/, and its heading there.
FIGURES = {"ranks": "Rank sweep", "difference": "Mean ranks", "forgetting": "Forgetting"}


def tables_of_suite():
    """What a run of the suite ends with; .complete is missing beside tables with stale cells."""
    tables = ["leaderboard.md", "cells.csv", "cells.parquet", "tables.tex", ".complete"]
    tables += [f"{name}.md" for name in PLACES.values()]
    return [
        *(f"{HOME}/tables/{name}" for name in tables),
        *(f"{HOME}/figures/tradeoff.{kind}" for kind in ("svg", "pdf", "png")),
        *(
            f"{HOME}/figures/{figure}-{name}.{kind}"
            for name in PLACES.values()
            for figure in FIGURES
            for kind in ("svg", "pdf")
        ),
    ]


def in_report(path):
    """A table or figure with its caption and category, if `snakemake --report` shows it."""
    name = Path(path).stem
    if path.endswith("tables/leaderboard.md"):
        return report(path, caption="../report/leaderboard.rst", category="Leaderboard")
    if path.endswith("figures/tradeoff.svg"):
        return report(path, caption="../report/tradeoff.rst", category="Trade-off")
    for (base, target), place in PLACES.items():
        labels = {"base": base, "target": target}
        if path.endswith(f"tables/{place}.md"):
            caption = "../report/tables.rst"
            return report(path, caption=caption, category="Tables", labels=labels)
        for figure, category in FIGURES.items():
            if path.endswith(f"figures/{figure}-{place}.svg"):
                caption = f"../report/{figure}.rst"
                return report(path, caption=caption, category=category, labels=labels)
    return path


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
