"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ballast.layout import Layout

if TYPE_CHECKING:
    from ballast.results import Results

SuiteOption = Annotated[
    Path | None, typer.Option("--suite", help="The suite's file; config/config.yaml if not given.")
]
ResultsOption = Annotated[
    Path | None, typer.Option("--results", help="results/SUITE or results/kept/SUITE instead.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def opened(suite: Path | None, folder: Path | None) -> Results:
    """The results that the options name."""
    from ballast.commands.source import open_results

    return open_results(suite, folder, Layout.here())
