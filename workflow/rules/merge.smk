# Results from other machines, from results/SUITE/incoming/ to results/SUITE/community/: trains nothing.
rule merge:
    log:
        f"{HOME}/logs/merge.log",
    conda:
        "../../envs/ballast.yaml"
    params:
        suite=HOME,
    script:
        "../scripts/merge.py"
