"""What a command reads: the results of a suite, and a row or a cell in them by what a user typed.

A name is a row's key (`lora-r8`, `lora-r8+dropped`), a cell's id, or a beginning of ids that fits
cells of one row only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from ballast.errors import DataError, unknown
from ballast.escape import one_line, shorten
from ballast.keep import RECORDS
from ballast.layout import Layout
from ballast.results import Results, kept_results, read_results
from ballast.statistics.rows import row_keys
from ballast.suite import read_config

Place = tuple[str, str]
SUITE = Path("config/config.yaml")


def open_results(suite: Path | None, folder: Path | None, layout: Layout) -> Results:
    """The results of a suite's file (config/config.yaml if neither is given), or of a folder.

    folder: results/SUITE or results/kept/SUITE. Of a suite that has not run here, the kept results
    are taken. Raises DataError where there are none.
    """
    if suite is not None and folder is not None:
        raise DataError("--suite and --results: give one of them")
    kept = kept_folder(suite, folder, layout)
    if kept is not None:
        return _checked(kept_results(kept), f"{kept}")
    if folder is not None:
        return _checked(_of_folder(folder, layout), f"{folder}")
    path = suite or SUITE
    config = read_config(path)
    home = layout.suite(config["suite"])
    plan = _plan(config, layout, path.parent)
    rates = path.parent / config["learning_rates"] if "learning_rates" in config else None
    return _checked(read_results(layout, config["suite"], plan, rates), f"{home} (of {path})")


def kept_folder(suite: Path | None, folder: Path | None, layout: Layout) -> Path | None:
    """The folder of the kept suite that `open_results` reads; None if it reads a run's folder."""
    if folder is not None:
        return folder if (folder / RECORDS).is_file() else None
    name = read_config(suite or SUITE)["suite"]
    if any(layout.suite(name).glob("cells/*/run.json")):
        return None
    kept = layout.results / "kept" / name
    return kept if (kept / RECORDS).is_file() else None


def _of_folder(folder: Path, layout: Layout) -> Results:
    if (folder / "cells").is_dir():
        name = folder.resolve().name
        return read_results(Layout(layout.root, folder.resolve().parent), name, None)
    raise DataError(
        f"--results {folder}: no results there; expected cells/ or {RECORDS}, as in results/SUITE "
        "or results/kept/SUITE"
    )


def _plan(config: dict, layout: Layout, folder: Path) -> pd.DataFrame | None:
    """The suite's plan if a run has made it: reading results plans nothing."""
    from ballast.plan import plan_key, read_plan

    path = layout.plan(config["suite"], plan_key(config, layout, folder))
    return read_plan(path) if path.exists() else None


def _checked(results: Results, where: str) -> Results:
    if results.records:
        return results
    why = f"; {len(results.problems)} damaged: {results.problems[0]}" if results.problems else ""
    raise DataError(
        f"{where}: no records{why}; run the suite first, or name another (--suite, --results)"
    )


@dataclass(frozen=True)
class Named:
    """What a name stands for. cell: the cell's id, or None for a row; name: id or key."""

    base: str
    target: str
    key: str
    cell: str | None = None

    @property
    def name(self) -> str:
        return self.cell or self.key

    @property
    def place(self) -> Place:
        return self.base, self.target


def find(results: Results, text: str) -> list[Named]:
    """What `text` names: one cell, or a row in each base and target that has it.

    Raises DataError with the nearest names if nothing fits, or several rows do.
    """
    table = results.table
    keys = pd.Series(row_keys(table), index=table.index, dtype=object)
    named = pd.DataFrame(
        {"id": table["id"], "base": table["base"], "target": table["target"], "key": keys}
    )
    exact = named[named["id"] == text]
    if len(exact):
        return [_cell(exact.iloc[0])]
    rows = named[(named["key"] == text) & (table["status"] != "unplanned")]
    if len(rows):
        places = rows.drop_duplicates(["base", "target"])
        return [
            Named(b, t, text) for b, t in sorted(zip(places["base"], places["target"], strict=True))
        ]
    begun = named[named["id"].str.startswith(text)] if text else named.iloc[:0]
    if len(begun) == 1:
        return [_cell(begun.iloc[0])]
    wheres = begun[["base", "target", "key"]].drop_duplicates()
    if len(wheres) == 1:
        return [Named(*wheres.iloc[0])]
    shown = shorten(one_line(text), 80)
    if len(begun):
        some = ", ".join(begun["id"].iloc[:3])
        raise DataError(
            f"{shown}: {len(begun)} cells of {len(wheres)} rows begin so: {some}, …; "
            "give a row like lora-r8, or more of the id"
        )
    known = sorted(set(keys))
    raise DataError(shorten(unknown("row or cell", shown, known), 240))


def _cell(row: pd.Series) -> Named:
    return Named(row["base"], row["target"], row["key"], row["id"])


def at_place(results: Results, place: Place) -> Results:
    """The results of one base and target alone."""
    table = results.table
    table = table[(table["base"] == place[0]) & (table["target"] == place[1])]
    cells = set(table["id"])
    items, curves = results.items, results.curves
    return replace(
        results,
        table=table.reset_index(drop=True),
        records={cell: r for cell, r in results.records.items() if cell in cells},
        items=items[items["cell"].isin(cells)],
        curves=curves[curves["cell"].isin(cells)],
    )


def chosen_places(found: list[Place], base: str | None, target: str | None) -> list[Place]:
    """Those of the bases and targets that --base and --target leave. Raises DataError if none."""
    for at, (option, value) in enumerate((("base", base), ("target", target))):
        known = {place[at] for place in found}
        if value is not None and value not in known:
            raise DataError(f"--{option}: {unknown(option, one_line(value), known)}")
    left = [p for p in found if base in (None, p[0]) and target in (None, p[1])]
    if not left:
        raise DataError(f"--base {base} --target {target}: not run together; {_listed(found)}")
    return left


def one_place(found: list[Place], base: str | None, target: str | None) -> Place:
    """The one base and target that --base and --target leave. Raises DataError if several are."""
    left = chosen_places(found, base, target)
    if len(left) > 1:
        raise DataError(f"give --base and --target; {_listed(left)}")
    return left[0]


def _listed(places: list[Place]) -> str:
    return "there are " + ", ".join(f"{base} tuned on {target}" for base, target in places)
