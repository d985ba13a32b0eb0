# Ballast: every method x rank x base x seed, trained and scored under the same conditions.
# The targets that a person asks for stand here; the stages are in workflow/rules/.
from snakemake.utils import min_version

min_version("9.20")


# Jobs run in it with `--sdm apptainer`, and only then; envs/ballast.def builds it.
container: "envs/ballast.sif"


include: "workflow/rules/common.smk"
include: "workflow/rules/cluster.smk"
include: "workflow/rules/bases.smk"
include: "workflow/rules/cells.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/site.smk"
include: "workflow/rules/curves.smk"
include: "workflow/rules/tune.smk"
include: "workflow/rules/benchmark.smk"
include: "workflow/rules/merge.smk"


rule all:
    default_target: True
    input:
        tables_of_suite(),
        f"{HOME}/leaderboard/index.html",
        f"{HOME}/leaderboard/.complete",
        # Named here too: a record that was removed is made again, though the tables are newer.
        records_of(PLAN, f"{HOME}/cells"),


onstart:
    check_arrays()
    drop_spares(Path(HOME))
    os.environ[RETRIES] = str(retries_here())
    print(opening())


onsuccess:
    print(closing())


onerror:
    print(closing())
