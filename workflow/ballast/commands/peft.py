"""Exchange with PEFT's own benchmark: `ballast peft export`, `ballast peft import`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ballast.commands.options import JsonOption, ResultsOption, SuiteOption, opened
from ballast.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

    from ballast.commands.screen import Screen

app = typer.Typer(help="Exchange results with PEFT's own benchmark (its result JSON).")


@app.command("export")
def export_(
    cell: Annotated[str, typer.Argument(help="A cell's id, or its beginning.")],
    file: Annotated[Path, typer.Argument(help="The JSON file to write.")],
    suite: SuiteOption = None,
    results: ResultsOption = None,
) -> int:
    """Write a cell's result as PEFT's benchmark would have written it."""
    from ballast.commands.source import find
    from ballast.exchange.peft_results import export_peft
    from ballast.files import write_json

    found = opened(suite, results)
    named = find(found, cell)
    if len(named) > 1 or named[0].cell is None:
        raise DataError(f"{cell}: a row; PEFT's format has one run, so name a cell (its id)")
    record = found.records.get(named[0].name)
    if record is None:
        raise DataError(f"{named[0].name}: has not run yet, nothing to export")
    curve = found.folder / "cells" / named[0].name / "curve.csv" if found.folder else None
    write_json(file, export_peft(record, _curve(curve)))
    print(f"{file}: {named[0].name}")
    return 0


def _curve(path: Path | None) -> pd.DataFrame | None:
    import pandas as pd

    return pd.read_csv(path) if path is not None and path.is_file() else None


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="A folder of PEFT's result JSON files.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the rows to this CSV, too.")
    ] = None,
    json: JsonOption = False,
) -> int:
    """Read PEFT's results as rows of the published schema (results/published/)."""
    from ballast.commands.screen import Screen, print_json
    from ballast.exchange.peft_results import ballast_peft_table

    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    rows, problems = ballast_peft_table(folder)
    if not len(rows) and not problems:
        raise DataError(f"{folder}: no *.json files")
    if output is not None:
        _write(rows, output)
    if json:
        found = {"format": 1, "command": "peft import", "rows": rows.to_dict("records")}
        print_json(found | {"refused": problems})
    else:
        _show(rows, Screen())
    for problem in problems:
        print(f"refused: {problem}", file=sys.stderr)
    return 2 if not len(rows) else 0


def _write(rows: pd.DataFrame, path: Path) -> None:
    from ballast.files import replacing

    with replacing(path) as temporary:
        rows.to_csv(temporary, index=False, lineterminator="\n")
    print(f"{path}: {len(rows)} rows", file=sys.stderr)


def _show(rows: pd.DataFrame, screen: Screen) -> None:
    """One line for each run: its method and what it scored."""
    from ballast.tables.printed import compact, figures

    lines = []
    for label, run in rows.groupby("label", sort=False):
        target = run[run["role"] == "target"].iloc[0]
        lost = run[run["role"] == "upstream"]["value"]
        seconds = run.loc[run["task"] == "train_time", "value"]
        lines.append(
            [str(label), target["method"] or "–", figures(target["value"], 4), target["unit"],
             figures(lost.iloc[0]) if len(lost) else "–", compact(target["parameters"]),
             figures(seconds.iloc[0], 4) if len(seconds) else "–"]
        )  # fmt: skip
    headers = ["run", "method here", "target", "unit", "forgot", "params", "train s"]
    screen.table(headers, lines, left=2)
