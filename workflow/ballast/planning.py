"""Makes the plan of a suite, in a process of its own: `python -m ballast.planning REQUEST`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ballast.errors import BallastError
from ballast.files import read_json
from ballast.layout import Layout
from ballast.plan import make_plan, write_plan
from ballast.suite import load_suite
from ballast.tune import make_tune_plan


def main(arguments: list[str] | None = None) -> int:
    """Write the plan and the plan of `tune` beside it; a bad suite exits with 2 and one message."""
    parser = argparse.ArgumentParser(prog="python -m ballast.planning", description=__doc__)
    parser.add_argument("request", type=Path)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args(arguments)
    layout = Layout(options.root, options.results)
    request = read_json(options.request)
    try:
        suite = load_suite(request["config"], layout, Path(request["folder"]))
        plan = make_plan(suite, layout)
        tune = make_tune_plan(suite, plan)
    except BallastError as error:
        print(error, file=sys.stderr)
        return 2
    path = layout.plan(suite.name, request["key"])
    write_plan(tune, path.with_suffix(".tune.parquet"))
    write_plan(plan, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
