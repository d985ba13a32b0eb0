"""The quantities that rows are compared by, with the items behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ballast.statistics.crossed import Cube
from ballast.statistics.items import TaskItems, task_items
from ballast.statistics.rows import Rows, points_tasks

# Quantities in points that rows are compared and ranked by.
COMPARED = ("E", "F", "O")


@dataclass(frozen=True)
class Quantity:
    """One of E, F and O. values: points, [row, seed]; cubes: (weight, points [row, seed, item]) of
    each task; itemed: [row], whether a row has the items of every task in all of its seeds; based:
    whether the cubes are differences to the base, so that the base is as good as a row of zeros."""

    values: np.ndarray
    cubes: tuple[Cube, ...]
    itemed: np.ndarray
    based: bool


def compared(rows: Rows, items: pd.DataFrame) -> dict[str, Quantity]:
    """E, F and O of the rows. O's items are those of E and F, weighted as in its formula."""
    tasks = {role: points_tasks(rows.cells, role) for role in ("target", "upstream")}
    found = task_items(items, rows.cells["id"].tolist(), [*tasks["target"], *tasks["upstream"]])
    e = _quantity(rows, "E", tasks["target"], found)
    f = _quantity(rows, "F", tasks["upstream"], found)
    both = (*e.cubes, *f.cubes) if e.cubes and f.cubes else ()
    o = Quantity(rows.values("O"), both, e.itemed & f.itemed, e.based and f.based)
    return {"E": e, "F": f, "O": o}


def _quantity(rows: Rows, name: str, tasks: list[str], found: dict[str, TaskItems]) -> Quantity:
    parts = [itemed_task(rows, task, found) for task in tasks]
    values = rows.values(name)
    if not parts or not all(part.cubes for part in parts):
        return Quantity(values, (), np.zeros(len(values), dtype=bool), False)
    # All or none are differences to the base: a mean of both would be neither.
    based = all(part.based for part in parts)
    if not based:
        parts = [itemed_task(rows, task, found, based=False) for task in tasks]
    cubes = tuple((1 / len(parts), part.cubes[0][1]) for part in parts)
    return Quantity(values, cubes, np.all([part.itemed for part in parts], axis=0), based)


def itemed_task(rows: Rows, task: str, found: dict[str, TaskItems], based: bool = True) -> Quantity:
    """The score of one task with its items, less the base's where those are known and `based`."""
    score = rows.cells[f"score.{task}"].to_numpy(dtype=float, na_value=np.nan)
    values, here = rows.arrange(score), rows.place >= 0
    item = found.get(task)
    if item is None or len(item.items) < 2:
        return Quantity(values, (), np.zeros(len(values), dtype=bool), False)
    based = based and item.base is not None
    complete = rows.arrange(item.agreeing(score)) == 1
    itemed = here.any(axis=1) & (complete | ~here).all(axis=1)
    gains = 100 * rows.arrange(item.score - item.base if based else item.score)
    return Quantity(values, ((1.0, gains),), itemed, based)
