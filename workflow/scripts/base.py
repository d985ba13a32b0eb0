"""Make one base of a suite ready: model, data, untouched scores."""

import sys
from pathlib import Path

from ballast.errors import BallastError
from ballast.files import write_json
from ballast.layout import Layout
from ballast.orphans import end_with_run
from ballast.plan import read_plan
from ballast.ready import make_ready, spec_of_base
from ballast.tasks import read_tasks

end_with_run()

with open(snakemake.log[0], "w", buffering=1) as log:

    def report(line: str) -> None:
        print(line, file=log)
        print(f"{snakemake.wildcards.base}: {line}", file=sys.stderr, flush=True)

    layout = Layout(Path(snakemake.resources.root), Path("results"))
    plan = read_plan(Path(snakemake.resources.plan))
    try:
        ready = make_ready(
            **spec_of_base(plan, snakemake.wildcards.base),
            tasks=read_tasks(layout.tasks),
            layout=layout,
            report=report,
        )
    except BallastError as error:
        report(f"error: {error}")
        sys.exit(1)
    write_json(Path(snakemake.output[0]), ready)
