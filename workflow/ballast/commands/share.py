"""Commands that hand results on: pack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ballast.errors import SuiteError
from ballast.layout import Layout


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(pack)


def pack(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[SUITE] FILE",
            help="A suite's file or its folder under results/ (config/config.yaml if not given), "
            "and the file to write.",
        ),
    ],
    origin: Annotated[
        str, typer.Option("--origin", help="Who you are: letters, digits, '_', '.', '-'.")
    ],
) -> int:
    """Pack a suite's results into one file that others can merge beside theirs."""
    from ballast.community import pack as write
    from ballast.suite import read_config

    if len(words) > 2:
        raise SuiteError(f"pack: {len(words)} names; give [SUITE] FILE")
    suite, file = Path(words[0] if len(words) == 2 else "config/config.yaml"), Path(words[-1])
    if file.suffix != ".zip":
        raise SuiteError(f"pack: {file}: the file to write ends in .zip")
    folder = suite if suite.is_dir() else Layout.here().suite(read_config(suite)["suite"])
    count = write(folder, file, origin)
    print(f"{file}: {count} records of {origin}, {file.stat().st_size / 1e6:.1f} MB")
    print("To merge it: put it into results/SUITE/incoming/ there, then `snakemake merge`.")
    return 0
