"""The quantities that rows are compared by, with the items behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ballast.statistics.crossed import Cube
from ballast.statistics.items import TaskItems, agreeing, task_items
from ballast.statistics.rows import Rows, points_tasks


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
    values, here = rows.values(name), rows.place >= 0
    usable = [found[k] for k in tasks if k in found and found[k].score.shape[1] > 1]
    if not tasks or len(usable) < len(tasks):
        return Quantity(values, (), np.zeros(len(values), dtype=bool), False)
    based = all(item.base is not None for item in usable)
    itemed = here.any(axis=1)
    cubes = []
    for task, item in zip(tasks, usable, strict=True):
        score = rows.cells[f"score.{task}"].to_numpy(dtype=float, na_value=np.nan)
        itemed &= (rows.arrange(agreeing(item, score)) == 1).sum(axis=1) == here.sum(axis=1)
        gains = item.score - item.base if based else item.score
        cubes.append((1 / len(tasks), 100 * rows.arrange(gains)))
    return Quantity(values, tuple(cubes), itemed, based)
