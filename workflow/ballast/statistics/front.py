"""The front of specialization and stability as a probability, by a crossed bootstrap.

In every draw the seeds and each task's items are drawn again with replacement, the same for all
rows, and E, F, the front and the hypervolume are found anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ballast.statistics.crossed import Cube
from ballast.statistics.seeds import LEVEL

DRAWS = 1000
# Points; sums in another order differ by less, and are equal.
DIGITS = 4


@dataclass(frozen=True)
class Box:
    """The possible: E from 0 to `e` (100 - the base's Target), F from `f_low` (- the base's Source,
    all forgotten) to `f_high` (100 - the base's Source)."""

    e: float
    f_low: float
    f_high: float


@dataclass(frozen=True)
class Front:
    """share: of the draws in which each row is on the front; hypervolume: of the rows' means, and
    its percentile interval over the draws, as shares of the possible; None where there is no box or
    no row with two seeds."""

    share: np.ndarray
    hypervolume: float | None
    low: float | None
    high: float | None
    draws: int


def front(
    e: np.ndarray, f: np.ndarray, e_cubes: Sequence[Cube], f_cubes: Sequence[Cube],
    itemed: tuple[np.ndarray, np.ndarray], box: Box | None, draws: int = DRAWS, seed: int = 0,
) -> Front:  # fmt: skip
    """Bootstrap the front of rows with at least two seeds; others have no share.

    e, f: points, [row, seed], NaN where a row lacks a seed; cubes: the items behind them, as in
    `crossed.differences`; itemed: [row] for E and for F, whether a row has them: a row that has not
    varies over seeds only.
    """
    known = ~np.isnan(e) & ~np.isnan(f)
    usable = np.flatnonzero(known.sum(axis=1) > 1)
    share = np.full(len(e), np.nan)
    if not len(usable):
        return Front(share, None, None, None, draws)
    e, f, known = (
        np.where(known, e, np.nan)[usable],
        np.where(known, f, np.nan)[usable],
        known[usable],
    )
    draw = np.random.default_rng(seed)
    weights = _seed_weights(known, draws, draw)
    pair = [
        _resampled(value, [(w, x[usable]) for w, x in cubes], has[usable], weights, draw)
        for value, cubes, has in zip((e, f), (e_cubes, f_cubes), itemed, strict=True)
    ]
    share[usable] = on_front(*pair).mean(axis=0)
    if box is None or box.e <= 0:
        return Front(share, None, None, None, draws)
    volumes = hypervolume(*pair, box)
    means = (np.nanmean(value, axis=1)[None, :] for value in (e, f))
    low, high = np.quantile(volumes, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Front(share, float(hypervolume(*means, box)[0]), float(low), float(high), draws)


def _seed_weights(known: np.ndarray, draws: int, draw: np.random.Generator) -> np.ndarray:
    """How often each row's seeds are drawn, [draw, row, seed]: one draw of seeds for all rows;
    where a row has none of the drawn, its own are drawn."""
    n_rows, n_seeds = known.shape
    counts = draw.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=draws)
    found = np.empty((draws, n_rows, n_seeds), dtype=np.float32)
    patterns, which = np.unique(known, axis=0, return_inverse=True)
    for at, pattern in enumerate(patterns):
        mine = counts * pattern
        empty = mine.sum(axis=1) == 0
        mine[empty] = draw.multinomial(pattern.sum(), pattern / pattern.sum(), size=empty.sum())
        found[:, which.reshape(-1) == at, :] = mine[:, None, :]
    return found


def _resampled(
    values: np.ndarray, cubes: Sequence[Cube], itemed: np.ndarray, weights: np.ndarray,
    draw: np.random.Generator,
) -> np.ndarray:  # fmt: skip
    """The quantity of each row in every draw, [draw, row], points."""
    total = weights.sum(axis=2)
    by_seed = np.einsum("brs,rs->br", weights, np.nan_to_num(values), dtype=np.float64) / total
    draws, n_rows, n_seeds = weights.shape
    moved = np.zeros((draws, n_rows))
    for weight, cube in cubes:
        n = cube.shape[2]
        counts = draw.multinomial(n, np.full(n, 1 / n), size=draws) - 1
        # What drawing these items adds to every cell's mean; float32 is exact for items of 0 and 1.
        scores = np.nan_to_num(cube / 100).astype(np.float32).reshape(n_rows * n_seeds, n)
        added = (counts.astype(np.float32) @ scores.T).reshape(draws, n_rows, n_seeds)
        moved += 100 * weight / n * np.einsum("brs,brs->br", weights, added) / total
    return np.round(by_seed + np.where(itemed, moved, 0.0), DIGITS)


def _staircase(e: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of each draw by falling E, then F: their order, E and F."""
    order = np.lexsort((-f, -e), axis=-1)
    return order, np.take_along_axis(e, order, -1), np.take_along_axis(f, order, -1)


def on_front(e: np.ndarray, f: np.ndarray) -> np.ndarray:
    """Whether each row is on the front, [draw, row]: no other is at least as high in both and
    higher in one."""
    order, e, f = _staircase(e, f)
    best = np.maximum.accumulate(f, axis=-1)
    new = np.ones(e.shape, dtype=bool)
    new[:, 1:] = (e[:, 1:] != e[:, :-1]) | (f[:, 1:] != f[:, :-1])
    free = np.ones(e.shape, dtype=bool)
    free[:, 1:] = f[:, 1:] > best[:, :-1]
    # Equal points share what the first of them is.
    first = np.maximum.accumulate(np.where(new, np.arange(e.shape[-1]), 0), axis=-1)
    found = np.empty(e.shape, dtype=bool)
    np.put_along_axis(found, order, np.take_along_axis(free, first, -1), -1)
    return found


def hypervolume(e: np.ndarray, f: np.ndarray, box: Box) -> np.ndarray:
    """Share of the box that is below some row in both E and F, [draw]."""
    _, e, f = _staircase(np.clip(e, 0.0, box.e), np.clip(f, box.f_low, box.f_high))
    height = np.maximum.accumulate(f, axis=-1) - box.f_low
    width = -np.diff(e, axis=-1, append=0.0)
    return (width * height).sum(axis=-1) / (box.e * (box.f_high - box.f_low))
