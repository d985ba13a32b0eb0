"""The `ballast` command: what is not a target of the workflow.

ballast retry [SUITE.yaml] [-- SNAKEMAKE ARGUMENTS]   try the failed cells again
ballast cell SUITE.yaml CELL                          run one cell here, in this process
ballast plan [SUITE.yaml]                             list the cells and their status
ballast export CELL FOLDER [--merged]                 a cell as an adapter of PEFT's, or merged
ballast methods [--write]                             the table of methods/README.md
ballast benchmark FOLDER [--hidden 512 2048 ...]      the price of each method's step
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pandas as pd

from ballast.errors import BallastError, SuiteError
from ballast.files import write_text
from ballast.layout import Layout
from ballast.status import forget_failed, make_plan_file, opening_text, statuses
from ballast.suite import read_config

DEFAULT = Path("config/config.yaml")


def _plan(path: Path, layout: Layout) -> tuple[str, Path]:
    """Name of a suite and the file of its plan."""
    config = read_config(path)
    plan = make_plan_file(config, layout.root, layout.results, path.parent)
    return config["suite"], plan


def _retry(options: argparse.Namespace, layout: Layout) -> int:
    name, path = _plan(options.suite, layout)
    removed = forget_failed(pd.read_parquet(path), layout, name)
    print(f"{len(removed)} failed cells to try again", *removed, sep="\n  ")
    if not removed:
        return 0
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--configfile",
        str(options.suite),
        *options.snakemake,
    ]
    return subprocess.run(command).returncode


def _cell(options: argparse.Namespace, layout: Layout) -> int:
    from ballast import cell

    _, path = _plan(options.suite, layout)
    known = pd.read_parquet(path)["id"]
    found = [name for name in known if name.startswith(options.cell)]
    if len(found) != 1:
        raise SuiteError(f"{options.cell}: {len(found)} cells begin so; `ballast plan` lists them")
    arguments = [str(path), found[0], "--root", str(layout.root), "--results", str(layout.results)]
    return cell.main(arguments)


def _list(options: argparse.Namespace, layout: Layout) -> int:
    name, path = _plan(options.suite, layout)
    plan = pd.read_parquet(path)
    for cell, status in statuses(plan, layout, name).items():
        print(f"{status:8} {cell}")
    print(opening_text(plan, layout, name, cores=1))
    return 0


def _export(options: argparse.Namespace, layout: Layout) -> int:
    from ballast.export import export_cell, find_cell

    cell = find_cell(options.cell, layout.results)
    print(export_cell(cell, options.folder, layout, options.merged))
    return 0


def _methods(options: argparse.Namespace, layout: Layout) -> int:
    from ballast.index import PAGE, index_text

    text = index_text(layout.methods)
    if options.write:
        write_text(layout.methods / PAGE, text)
    else:
        print(text)
    return 0


def _benchmark(options: argparse.Namespace, layout: Layout) -> int:
    import torch

    from ballast.benchmark import Settings, write_benchmark
    from ballast.declare import discover

    torch.set_num_threads(options.threads)
    keys = ("hidden", "tokens", "precision", "methods", "rounds", "rank", "layers", "generated")
    given = {key: getattr(options, key) for key in keys if getattr(options, key) is not None}
    write_benchmark(discover(layout.methods), [], options.folder, Settings.of(given))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run a command; errors of the user's are one line on standard error and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="ballast", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    retry = commands.add_parser("retry", help="try the failed cells of a suite again")
    retry.add_argument("suite", type=Path, nargs="?", default=DEFAULT)
    retry.add_argument("snakemake", nargs="*", help="arguments for Snakemake, after --")
    retry.set_defaults(run=_retry)
    cell = commands.add_parser("cell", help="run one cell in this process (for a debugger)")
    cell.add_argument("suite", type=Path)
    cell.add_argument("cell", help="the cell's id, or a beginning of it that is unique")
    cell.set_defaults(run=_cell)
    plan = commands.add_parser("plan", help="list the cells of a suite and their status")
    plan.add_argument("suite", type=Path, nargs="?", default=DEFAULT)
    plan.set_defaults(run=_list)
    export = commands.add_parser("export", help="take a trained cell to PEFT, vLLM, transformers")
    export.add_argument("cell", help="a cell's folder, its id, or a beginning of that")
    export.add_argument("folder", type=Path, help="where to write")
    export.add_argument("--merged", action="store_true", help="plain weights, not an adapter")
    export.set_defaults(run=_export)
    methods = commands.add_parser("methods", help="what every file of methods/ is")
    methods.add_argument("--write", action="store_true", help="to methods/README.md")
    methods.set_defaults(run=_methods)
    benchmark = commands.add_parser("benchmark", help="the price of each method's step")
    benchmark.add_argument("folder", type=Path, help="for steps.csv and benchmark.md")
    for key in ("hidden", "tokens"):
        benchmark.add_argument(f"--{key}", type=int, nargs="+")
    for key in ("precision", "methods"):
        benchmark.add_argument(f"--{key}", nargs="+")
    for key in ("rounds", "rank", "layers", "generated"):
        benchmark.add_argument(f"--{key}", type=int)
    benchmark.add_argument("--threads", type=int, default=2)
    benchmark.set_defaults(run=_benchmark)
    options = parser.parse_args(arguments)
    try:
        return options.run(options, Layout.here())
    except BallastError as error:
        print(f"ballast: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
