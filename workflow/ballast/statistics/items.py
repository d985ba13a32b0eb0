"""Scores of single items: cells x items of a task, and tests between two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from ballast.statistics.seeds import LEVEL

# Points by which the mean of a cell's items may miss its score: rounding of the stored items.
TOLERANCE = 0.01


@dataclass(frozen=True)
class TaskItems:
    """One task's items. score and base: [cell, item], 0 to 1, NaN where a cell has none; items:
    their ids in ascending order; base: None where some cell that has items lacks the base's."""

    items: np.ndarray
    score: np.ndarray
    base: np.ndarray | None

    def agreeing(self, value: np.ndarray) -> np.ndarray:
        """Cells that have every item, and whose items average to their score (points, [cell]).

        Corpus metrics do not, nor do samples of some items: they are not compared item by item.
        """
        return np.abs(100 * self.score.mean(axis=1) - value) <= TOLERANCE


def task_items(items: pd.DataFrame, cells: list[str], tasks: list[str]) -> dict[str, TaskItems]:
    """The items of these cells by task, cells in the order given; none of tasks without."""
    chosen, cell = _of_cells(items["cell"], cells)
    part = items[["task", "item", "score", "base_score"]].take(chosen)
    task = _positions(part["task"], tasks)
    name = part["item"].to_numpy()
    score, base = (_numbers(part[column]) for column in ("score", "base_score"))
    found = {}
    for at, title in enumerate(tasks):
        of_task = task == at
        if of_task.any():
            found[title] = _arrange(len(cells), *(x[of_task] for x in (cell, name, score, base)))
    return found


def _of_cells(column: pd.Series, cells: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Which entries of a column name these cells, in order, and the position of each one's cell.

    Items of a cell mostly lie together, so runs of equal names are looked up, not single entries:
    a suite has tens of millions of items, and each of its tables asks for its own.
    """
    values = pd.Categorical(column)
    start = np.flatnonzero(np.append(True, values.codes[1:] != values.codes[:-1]))
    length = np.diff(start, append=len(values))
    cell = np.append(pd.Index(cells).get_indexer(values.categories.astype(object)), -1)
    cell = cell[values.codes[start]] if len(values) else np.empty(0, dtype=int)
    start, length, cell = (x[cell >= 0] for x in (start[: len(cell)], length[: len(cell)], cell))
    before = np.cumsum(length) - length
    chosen = np.arange(length.sum()) + np.repeat(start - before, length)
    return chosen, np.repeat(cell, length)


def _positions(column: pd.Series, names: list[str]) -> np.ndarray:
    """For each entry of a column its position in names, -1 for others."""
    values = pd.Categorical(column)
    where = pd.Index(names).get_indexer(values.categories.astype(object))
    return np.append(where, -1)[values.codes]


def _numbers(column: pd.Series) -> np.ndarray:
    return pd.to_numeric(column).to_numpy(dtype=float, na_value=np.nan)


def _arrange(
    n_cells: int, cell: np.ndarray, name: np.ndarray, score: np.ndarray, base: np.ndarray
) -> TaskItems:
    at, known = pd.factorize(name, sort=True)
    scores = np.full((n_cells, len(known)), np.nan)
    before = scores.copy()
    scores[cell, at], before[cell, at] = score, base
    complete = not (np.isnan(before) & ~np.isnan(scores)).any()
    return TaskItems(np.asarray(known), scores, before if complete else None)


@dataclass(frozen=True)
class ItemTest:
    """Two checkpoints on the same items, [item] each. difference, low and high in points; won and
    lost: items that a has right and b has not, and the other way round; test: how p was found."""

    difference: float
    low: float
    high: float
    p: float
    won: int
    lost: int
    n: int
    test: str


def compare_items(a: np.ndarray, b: np.ndarray, draws: int = 2000, seed: int = 0) -> ItemTest:
    """Compare two checkpoints on a task: exact McNemar where items are right or wrong, the t test
    paired by item otherwise; the interval is a bootstrap paired by item."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    low, high = bootstrap_difference([(1.0, a - b)], draws, seed)
    won, lost = int((a > b).sum()), int((a < b).sum())
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        p, test = mcnemar_p(a, b), "exact McNemar"
    else:
        p, test = _t_p([(1.0, a - b)]), "t test paired by item"
    return ItemTest(100 * float((a - b).mean()), low, high, p, won, lost, len(a), test)


def mcnemar_p(a: np.ndarray, b: np.ndarray) -> float:
    """p of the exact McNemar test of two checkpoints whose items are 0 or 1."""
    a, b = np.asarray(a) >= 0.5, np.asarray(b) >= 0.5
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    return float(mcnemar(table, exact=True).pvalue)


def compare_means(
    parts: list[tuple[float, np.ndarray]], draws: int = 2000, seed: int = 0
) -> tuple[float, float, float, float]:
    """Compare two checkpoints on a weighted sum of tasks: (weight, differences [item]) each.

    Returns difference, low, high (points) and p: a bootstrap of the items within their tasks, and
    the t test paired by item with Welch-Satterthwaite degrees of freedom.
    """
    difference = 100 * sum(weight * float(d.mean()) for weight, d in parts)
    return difference, *bootstrap_difference(parts, draws, seed), _t_p(parts)


def bootstrap_difference(
    parts: list[tuple[float, np.ndarray]], draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval in points of a weighted sum of mean differences, items resampled."""
    draw, total = np.random.default_rng(seed), np.zeros(draws)
    for weight, d in parts:
        counts = draw.multinomial(len(d), np.full(len(d), 1 / len(d)), size=draws)
        total += weight * (counts @ d) / len(d)
    low, high = 100 * np.quantile(total, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return float(low), float(high)


def _t_p(parts: list[tuple[float, np.ndarray]]) -> float:
    usable = [(w, d) for w, d in parts if len(d) > 1]
    if len(usable) < len(parts):
        return float("nan")
    errors = [w * w * d.var(ddof=1) / len(d) for w, d in usable]
    total, mean = sum(errors), sum(w * d.mean() for w, d in usable)
    if total <= 0:
        return float(mean == 0)
    df = total**2 / sum(e * e / (len(d) - 1) for e, (_, d) in zip(errors, usable, strict=True))
    return float(2 * stats.t.sf(abs(mean) / np.sqrt(total), df))
