"""Commands that run cells of a suite: retry, cell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ballast.errors import SuiteError
from ballast.layout import Layout

if TYPE_CHECKING:
    import pandas as pd

DEFAULT = Path("config/config.yaml")
SuiteArgument = Annotated[Path, typer.Argument(metavar="[SUITE.yaml]", help="The suite's file.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(retry)
    app.command()(cell)


def plan_file(path: Path, layout: Layout) -> tuple[str, Path]:
    """Name of a suite and the file of its plan."""
    from ballast.status import make_plan_file
    from ballast.suite import read_config

    config = read_config(path)
    return config["suite"], make_plan_file(config, layout.root, layout.results, path.parent)


def read_table(path: Path) -> pd.DataFrame:
    """The cells of a plan's file."""
    import pandas as pd

    return pd.read_parquet(path)


def retry(
    suite: SuiteArgument = DEFAULT,
    snakemake: Annotated[
        list[str] | None, typer.Argument(help="Arguments for Snakemake, after --.")
    ] = None,
) -> int:
    """Try the failed cells of a suite again."""
    from ballast.status import forget_failed

    layout, arguments = Layout.here(), snakemake or []
    if str(suite).startswith("-"):
        suite, arguments = DEFAULT, [str(suite), *arguments]
    name, path = plan_file(suite, layout)
    removed = forget_failed(read_table(path), layout, name)
    print(f"{len(removed)} failed cells to try again", *removed, sep="\n  ", flush=True)
    if not removed:
        return 0
    command = [sys.executable, "-m", "snakemake", "--configfile", str(suite), *arguments]
    return subprocess.run(command).returncode


def cell(
    suite: Annotated[Path, typer.Argument(metavar="SUITE.yaml", help="The suite's file.")],
    cell: Annotated[str, typer.Argument(help="The cell's id, or a beginning that is unique.")],
) -> int:
    """Run one cell in this process (for a debugger)."""
    from ballast import cell as cells
    from ballast.devices import lease
    from ballast.plan import row_of

    layout = Layout.here()
    _, path = plan_file(suite, layout)
    found = [name for name in read_table(path)["id"] if name.startswith(cell)]
    if len(found) != 1:
        raise SuiteError(f"{cell}: {len(found)} cells begin so; `ballast plan --cells` lists them")
    arguments = [str(path), found[0], "--root", str(layout.root), "--results", str(layout.results)]
    count = json.loads(row_of(path, found[0])["spec"])["limits"]["gpus"]
    with lease(count, found[0]) as gpus:
        os.environ.update(gpus.environment)
        return cells.main(arguments)
