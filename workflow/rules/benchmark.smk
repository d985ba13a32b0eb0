# Where the time goes, and the price of a step against the frozen base and against PEFT.
rule benchmark:
    output:
        steps=f"{HOME}/benchmark/steps.csv",
        phases=f"{HOME}/benchmark/phases.csv",
        page=f"{HOME}/benchmark/benchmark.md",
    log:
        f"{HOME}/logs/benchmark.log",
    conda:
        "../../envs/ballast.yaml"
    threads: all_cores
    resources:
        root=str(ROOT),
    script:
        "../scripts/benchmark.py"
