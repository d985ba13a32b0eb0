"""Parts of the page that a suite may have: learning curves, trajectories, rates, paper tables."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ballast.errors import BallastError
from ballast.published import tables_of
from ballast.results import Results
from ballast.site.quantities import EQUAL, POINTS, Quantity, rounded
from ballast.statistics.analysis import Analysis

POINTS_OF_CURVE = 40
CURVE = "curve.csv"


def read_losses(text: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and training losses from the text of a cell's curve.csv; None if it is damaged."""
    head, _, body = text.partition("\n")
    names = head.strip().split(",")
    try:
        if not {"step", "loss"} <= set(names):
            return None
        flat = np.array(body.replace("\n", ",").strip(", ").split(","), dtype=float)
        table = flat.reshape(-1, len(names))
    except ValueError:
        return None
    return table[:, names.index("step")], table[:, names.index("loss")]


def thinned(steps: np.ndarray, losses: np.ndarray) -> tuple[list[Any], list[Any]]:
    """At most `POINTS_OF_CURVE` points: mean losses of equal runs of steps, at their last step."""
    count = min(POINTS_OF_CURVE, len(steps))
    if count == 0:
        return [], []
    ends = np.linspace(0, len(steps), count + 1).astype(int)
    means = np.add.reduceat(losses, ends[:-1]) / np.diff(ends)
    return rounded(steps[ends[1:] - 1], 0), rounded(means, 4)


def losses(folder: Path | None, cells: Iterable[str]) -> dict[str, Any]:
    """Learning curves: `steps` are the distinct lists of steps; `of`: [list, losses] by cell.

    Empty without the cells' folder (a kept suite).
    """
    if folder is None:
        return {}
    steps: dict[tuple[int, ...], int] = {}
    found: dict[int, list[Any]] = {}
    for at, cell in enumerate(cells):
        try:
            text = (folder / "cells" / cell / CURVE).read_text(encoding="utf-8")
        except (OSError, ValueError):  # not trained, or damaged: it has no line
            continue
        curve = read_losses(text)
        if curve is not None and len(curve[0]):
            x, y = thinned(*curve)
            found[at] = [steps.setdefault(tuple(x), len(steps)), y]
    return {"steps": [list(x) for x in steps], "of": found} if found else {}


def points(curves: pd.DataFrame, cells: pd.Series, at: list[int]) -> dict[str, Any]:
    """Trajectories and rewinds: for each kind, by row, the mean of E and F over seeds per share.

    {kind: {row: [[share, E, F, seeds], ...]}}
    """
    if curves is None or curves.empty:
        return {}
    row_of = dict(zip(cells, at, strict=True))
    block = curves[curves["cell"].isin(row_of)]
    block = block.assign(row=block["cell"].map(row_of), share=block["share"].astype("float64"))
    block = block.dropna(subset=["E", "F"])
    means = block.astype({"E": "float64", "F": "float64"}).groupby(["kind", "row", "share"])
    means = means.agg(E=("E", "mean"), F=("F", "mean"), n=("cell", "nunique")).reset_index()
    found: dict[str, dict[int, list[Any]]] = {}
    for kind, row, share, e, f, n in means.itertuples(index=False, name=None):
        numbers = [*rounded([share], 4), *rounded([e, f], 2), int(n)]
        found.setdefault(str(kind), {}).setdefault(int(row), []).append(numbers)
    return found


def rates(table: pd.DataFrame | None, analysis: Analysis) -> list[dict[str, Any]]:
    """Validation results per learning rate of each row of a base and target, from `tune`.

    [{key, title, family, x: rates, score, and E and F where they were measured}]
    """
    if table is None or table.empty:
        return []
    chosen = table[(table["base"] == analysis.base) & (table["target"] == analysis.target)]
    measured = [name for name in ("score", "loss", "E", "F") if name in chosen]
    keys = ["method", "variant", "rank"]
    means = chosen[chosen["status"] == "ok"].groupby([*keys, "learning_rate"], dropna=False)
    means = means[measured].mean().reset_index()
    rows = analysis.rows.reset_index(names="key")
    rows = rows.assign(variant=rows["variant"].fillna("").astype(str))[["key", *keys]]
    means = means.merge(rows, on=keys, how="left")
    means["key"] = means["key"].fillna(means["method"])
    found = []
    for key, block in means.groupby("key", sort=True):
        numbers = {name: rounded(block[name], 4 if name == "loss" else 2) for name in measured}
        x = rounded(block["learning_rate"], None)
        found.append({"key": str(key), "method": str(block["method"].iloc[0]), "x": x} | numbers)
    return found


def with_equal(
    results: Results, analysis: Analysis, rows: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, Quantity]]:
    """The rows with what the methods retain where they reach the same E, if there are curves."""
    try:
        equal = importlib.import_module("ballast.curves.equal").at_equal_specialization
        found = equal(results, analysis.base, analysis.target)
    except (ImportError, AttributeError, BallastError):
        return rows, {}
    found = found.dropna(axis=1, how="all").reindex(rows["key"])
    found = found[[name for name in found if name not in rows]].set_index(rows.index)
    return pd.concat([rows, found], axis=1), {
        name: _equal(name) for name in found if not name.endswith((".low", ".high"))
    }


def _equal(name: str) -> Quantity:
    kind, _, level = name.partition("@")
    if kind == "F":
        text = f"Stability F where the method reaches a specialization E of {level} points."
        return Quantity(name, f"F at E = {level}", EQUAL, 2, POINTS, 1, text, True)
    text = f"Share of seeds that reached a specialization E of {level} points."
    return Quantity(name, f"{kind} E = {level}", EQUAL, 3, "share", 0, text)


def published(
    results: Results, analyses: Mapping[tuple[str, str], Analysis], protocol: str | None
) -> list[dict[str, Any]]:
    """Tables published | ours of the protocol that the suite names: title, columns of text, notes.

    Raises SuiteError for a protocol that is not known.
    """
    return [_side(item) for item in tables_of(results, protocol, analyses)] if protocol else []


def _side(table: pd.DataFrame) -> dict[str, Any]:
    columns = []
    table = table.loc[:, [name for name in table if _says_something(table[name])]]
    for name in table:
        column = table[name]
        if pd.api.types.is_numeric_dtype(column):
            columns.append(rounded(column.astype("float64"), None))
        else:
            columns.append(["" if pd.isna(value) else str(value) for value in column])
    return {
        "title": table.attrs["title"],
        "place": list(table.attrs["place"]),
        "columns": list(table.columns),
        "values": columns,
        "notes": table.attrs["notes"],
    }


def _says_something(column: pd.Series) -> bool:
    return bool((column.notna() & (column.astype("string") != "")).any())
