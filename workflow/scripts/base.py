"""Make one base of a suite ready: model, data, untouched scores."""

import os
import sys
from pathlib import Path

from ballast.devices import lease
from ballast.faults import told_in_one_line
from ballast.files import write_sealed
from ballast.layout import Layout
from ballast.orphans import end_with_run
from ballast.plan import read_plan
from ballast.ready import gpus_of_base, make_ready, spec_of_base
from ballast.supervise import run_check
from ballast.tasks import read_tasks

end_with_run()

name = snakemake.wildcards.base
with (
    told_in_one_line(name),
    open(snakemake.log[0], "w", buffering=1) as log,
    told_in_one_line(name, log),
):

    def report(line: str) -> None:
        print(line, file=log)
        print(f"{name}: {line}", file=sys.stderr, flush=True)

    layout = Layout(Path(snakemake.resources.root), Path("results"))
    plan = read_plan(Path(snakemake.resources.plan))
    with lease(gpus_of_base(plan, name), name, run_check()) as gpus:
        os.environ.update(gpus.environment)
        ready = make_ready(
            **spec_of_base(plan, name), tasks=read_tasks(layout.tasks), layout=layout, report=report
        )
    write_sealed(Path(snakemake.output[0]), ready)
