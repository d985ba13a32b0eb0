"""Two rows, or two checkpoints, side by side: what differs, by how much, and who says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ballast.errors import BallastError, unknown
from ballast.results import Results
from ballast.statistics.crossed import differences, prior_of_rows
from ballast.statistics.items import TaskItems, compare_items, compare_means, task_items
from ballast.statistics.moderate import Prior
from ballast.statistics.points import COMPARED, Quantity, compared, itemed_task
from ballast.statistics.rows import Rows, points_tasks, row_keys, rows_of

COLUMNS = (
    "quantity", "role", "value_a", "value_b", "difference", "low", "high", "p", "test", "won",
    "lost", "n_items", "n_seeds",
)  # fmt: skip
NO_TEST = "none: fewer than two seeds in common"


class ChoiceError(BallastError):
    """A comparison of rows or cells that are not there, or not of one kind."""


@dataclass(frozen=True)
class Comparison:
    """a and b of one base and target. kind: rows or cells.

    table: one row per task in points (role target or upstream), then E, F and O (role measure).
    value_a, value_b: means over the seeds in common; difference: a - b; low, high: 95 %, all in
    points; p: not corrected; test: how it was found; won, lost: items that a has right more often
    than b over the seeds in common, and less often; n_items (Int64, missing where items are not
    known or not comparable), n_seeds. What is not known is missing.
    """

    base: str
    target: str
    kind: str
    a: str
    b: str
    table: pd.DataFrame


def compare(
    results: Results, a: str, b: str, base: str | None = None, target: str | None = None
) -> list[Comparison]:
    """Compare two rows (by key) wherever both are, or two cells (by id) of one base and target.

    Raises ChoiceError if there is no such row or cell that is ok, or a is a cell and b a row.
    """
    good = results.table[(results.table["status"] == "ok").to_numpy(bool)]
    cells = set(good["id"])
    if a in cells and b in cells:
        return [_cells(results, good, a, b)]
    if (a in cells) != (b in cells):
        raise ChoiceError(f"{a} and {b}: one is a cell and the other is not; name two of a kind")
    found = [
        _rows(results, *place, a, b)
        for place in _places(good, a, b)
        if base in (None, place[0]) and target in (None, place[1])
    ]
    if not found:
        where = f" with base {base or 'any'} and target {target or 'any'}"
        raise ChoiceError(f"{a} and {b} have results together nowhere{where}")
    return found


def _places(good: pd.DataFrame, a: str, b: str) -> list[tuple[str, str]]:
    keys = np.array(row_keys(good), dtype=object)
    for name in (a, b):
        if name not in keys:
            raise ChoiceError(unknown("row or cell", name, set(keys)))
    where = [
        set(zip(good["base"][keys == k], good["target"][keys == k], strict=True)) for k in (a, b)
    ]
    return sorted(where[0] & where[1])


def _table(lines: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(lines, columns=list(COLUMNS))
    counts = dict.fromkeys(("won", "lost", "n_items", "n_seeds"), "Int64")
    numbers = dict.fromkeys(("value_a", "value_b", "difference", "low", "high", "p"), float)
    return frame.astype(counts | numbers)


def _rows(results: Results, base: str, target: str, a: str, b: str) -> Comparison:
    table = results.table
    chosen = np.isin(np.array(row_keys(table), dtype=object), [a, b])
    every, rows = rows_of(table, base, target), rows_of(table[chosen], base, target)
    at = rows.keys.index(a), rows.keys.index(b)
    lines = []
    for name, role, quantity in _row_quantities(rows, results.items):
        column = name if role == "measure" else f"score.{name}"
        lines.append(_row_line(name, role, quantity, at, prior_of_rows(every.values(column))))
    return Comparison(base, target, "rows", a, b, _table(lines))


def _row_quantities(rows: Rows, items: pd.DataFrame) -> Iterator[tuple[str, str, Quantity]]:
    for role in ("target", "upstream"):
        names = points_tasks(rows.cells, role)
        found = task_items(items, rows.cells["id"].tolist(), names)
        for name in names:
            yield name, role, itemed_task(rows, name, found)
    for name, quantity in compared(rows, items).items():
        yield name, "measure", quantity


def _row_line(
    name: str, role: str, quantity: Quantity, at: tuple[int, int], prior: Prior
) -> dict[str, Any]:
    a, b = at
    values = quantity.values
    shared = ~np.isnan(values[a]) & ~np.isnan(values[b])
    line: dict[str, Any] = {"quantity": name, "role": role, "n_seeds": int(shared.sum())}
    test = differences(values, quantity.cubes, quantity.itemed, prior)
    with_items = bool(quantity.itemed[[a, b]].all()) and bool(quantity.cubes)
    if shared.any():
        half = float(test.half()[a, b])
        line |= {"value_a": values[a, shared].mean(), "value_b": values[b, shared].mean()}
        line |= {"difference": test.mean[a, b], "p": test.p()[a, b]}
        line |= {"low": line["difference"] - half, "high": line["difference"] + half}
    known = "t test paired by seed and item" if with_items else "t test paired by seed"
    known += ", moderated" if prior.df else ""
    line["test"] = known if shared.sum() > 1 else NO_TEST
    if with_items and shared.any():
        gaps = [x[a][shared].mean(axis=0) - x[b][shared].mean(axis=0) for _, x in quantity.cubes]
        line |= _counts(gaps)
    return line


def _counts(gaps: list[np.ndarray]) -> dict[str, int]:
    gap = np.round(np.concatenate(gaps), 9)
    return {"won": int((gap > 0).sum()), "lost": int((gap < 0).sum()), "n_items": len(gap)}


def _cells(results: Results, good: pd.DataFrame, a: str, b: str) -> Comparison:
    both = good.set_index("id", drop=False).loc[[a, b]]
    if len(both[["base", "target"]].drop_duplicates()) > 1:
        raise ChoiceError(f"{a} and {b} are not of one base and target, so not comparable")
    tasks = {role: points_tasks(both, role) for role in ("target", "upstream")}
    names = [*tasks["target"], *tasks["upstream"]]
    found = task_items(results.items, [a, b], names)
    found = {k: v for k, v in found.items() if _comparable(v, both[f"score.{k}"])}
    lines = [_cell_line(k, role, both, found.get(k)) for role in tasks for k in tasks[role]]
    lines += [_measure_line(name, both, _parts(name, tasks, found)) for name in COMPARED]
    base, target = both[["base", "target"]].iloc[0]
    return Comparison(base, target, "cells", a, b, _table(lines))


def _comparable(items: TaskItems, score: pd.Series) -> bool:
    return bool(items.agreeing(score.to_numpy(dtype=float, na_value=np.nan)).all())


def _values(name: str, both: pd.DataFrame) -> dict[str, Any]:
    a, b = both[name].to_numpy(dtype=float, na_value=np.nan)
    return {"value_a": a, "value_b": b, "difference": a - b, "n_seeds": 1}


def _cell_line(name: str, role: str, both: pd.DataFrame, items: TaskItems | None) -> dict[str, Any]:
    line = {"quantity": name, "role": role} | _values(f"score.{name}", both)
    if items is None:
        return line | {"test": "none: items are not known"}
    test = compare_items(items.score[0], items.score[1])
    counts = {"won": test.won, "lost": test.lost, "n_items": test.n}
    return line | {"low": test.low, "high": test.high, "p": test.p, "test": test.test} | counts


def _parts(
    name: str, tasks: dict[str, list[str]], found: dict[str, TaskItems]
) -> list[tuple[float, np.ndarray]] | None:
    """The weighted differences of items that make up a measure; None if some task has none."""
    roles = {"E": ("target",), "F": ("upstream",), "O": ("target", "upstream")}[name]
    parts = []
    for role in roles:
        if not tasks[role] or not set(tasks[role]) <= set(found):
            return None
        scores = [found[task].score for task in tasks[role]]
        parts += [(1 / len(scores), score[0] - score[1]) for score in scores]
    return parts


def _measure_line(
    name: str, both: pd.DataFrame, parts: list[tuple[float, np.ndarray]] | None
) -> dict[str, Any]:
    line = {"quantity": name, "role": "measure"} | _values(name, both)
    if parts is None:
        return line | {"test": "none: items are not known"}
    _, low, high, p = compare_means(parts)
    line |= {"low": low, "high": high, "p": p, "test": "t test paired by item"}
    return line | _counts([d for _, d in parts])
