"""Differences between methods, paired by seed and by item.

A method is compared with another on the same seeds and the same items, so a difference varies for
two reasons at once: other seeds would have trained other models, and other items would have been
asked. Both are random here. With D[s, i] the difference of an item's score in seed s, the variance
of the mean over S seeds and, for each task t of weight w, n items is

    V = s2(seed means) / S + sum_t w_t^2 (s2_t(item means) / n_t - s2_t(residual) / (S n_t))

because the residual is in both of the first terms. V is not let below either of them. Degrees of
freedom are Satterthwaite's. Without items V is the first term: the t test paired by seed.

Where three seeds agree by chance, V is the items' alone with hundreds of degrees of freedom, though
the seeds have two: then Satterthwaite's p is far too small (where the noise is mostly the seeds',
7 % of true nulls have p < .05 but 1 to 2 % have p < .001). So p is never below that of the t test
paired by seed, nor an interval narrower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from ballast.statistics.moderate import NONE, Prior, moderated, prior_of
from ballast.statistics.seeds import LEVEL, SMALLEST_ERROR, quantile

# More than this is the normal distribution; where all differences are equal it would be endless.
MOST_FREEDOM = 1e6
# With fewer rows their pairs say too little of how alike variances are.
FEWEST_ROWS = 5
Cube = tuple[float, np.ndarray]  # weight; points, [row, seed, item]


@dataclass(frozen=True)
class Differences:
    """Of all pairs of rows, [row, row], a - b in points.

    variance, df: of the mean, as above; spread: sd of the differences over seeds, and `lent` the
    degrees of freedom that it has from the table's other pairs; n: seeds in common. All but mean,
    lent and n are NaN with fewer than two seeds in common.
    """

    mean: np.ndarray
    variance: np.ndarray
    df: np.ndarray
    spread: np.ndarray
    lent: np.ndarray
    n: np.ndarray

    def p(self) -> np.ndarray:
        """Two-sided p of no difference: the larger of the crossed test's and the seeds' own."""
        errors = self.errors()
        found = (2 * special.stdtr(df, -np.abs(self.mean) / error) for error, df in errors)
        return np.maximum(*found)

    def half(self, level: float = LEVEL) -> np.ndarray:
        """Half the width of the interval, the wider of the two."""
        (crossed, df), (by_seed, _) = self.errors()
        own = np.arange(self.n.max(initial=0) + 1) - 1
        few = quantile(np.where(own > 0, own + self.lent.max(initial=0.0), 0), level)
        return np.maximum(special.stdtrit(df, 0.5 + level / 2) * crossed, few[self.n] * by_seed)

    def errors(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Standard error and df of the crossed test, and of that over seeds alone."""
        freedom = np.where(self.n > 1, self.n - 1.0 + self.lent, np.nan)
        by_seed = np.maximum(self.spread / np.sqrt(np.maximum(self.n, 1)), SMALLEST_ERROR)
        return (np.sqrt(self.variance), self.df), (by_seed, freedom)

    def part(self, a: np.ndarray, b: np.ndarray) -> Differences:
        """Some of the pairs, by the positions of their rows."""
        return Differences(*(getattr(self, k)[a, b] for k in self.__dataclass_fields__))


def differences(
    values: np.ndarray, cubes: Sequence[Cube], itemed: np.ndarray, prior: Prior = NONE
) -> Differences:
    """Compare all rows with each other.

    values: points, [row, seed], NaN where a row lacks a seed; cubes: items whose weighted means are
    the values up to a constant; itemed: [row], whether a row has them in all of its seeds. prior:
    of the variances over seeds, as of `prior_of_rows` (see `moderate`).
    """
    size = (len(values), len(values))
    blank = [np.full(size, np.nan) for _ in range(4)]
    found = Differences(*blank, np.full(size, prior.df), np.zeros(size, dtype=int))
    for shared, members, pairs in _common(~np.isnan(values)):
        part = _block(
            values[np.ix_(members, shared)],
            [(w, x[np.ix_(members, shared)]) for w, x in cubes],
            itemed[members],
            prior,
        )
        where = np.ix_(members, members)
        for name in ("mean", "variance", "df", "spread", "n"):
            whole = getattr(found, name)
            whole[where] = np.where(pairs, getattr(part, name), whole[where])
    return found


def prior_of_rows(values: np.ndarray) -> Prior:
    """What the variances over seeds of all pairs of a table's rows have in common.

    values: points, [row, seed], NaN where a row lacks a seed.
    """
    known = (~np.isnan(values)).sum(axis=1)
    several = values[known > 1]
    if len(several) < FEWEST_ROWS:
        return NONE
    a, b = np.triu_indices(len(several), k=1)
    each = several[a] - several[b]
    n = (~np.isnan(each)).sum(axis=1)
    each, n = each[n > 1], n[n > 1]
    # Of (rows - 1) (seeds - 1) degrees of freedom of the table, a pair's own are its own already.
    most = (len(several) - 2) * (known.max() - 1)
    return prior_of(np.nanvar(each, axis=1, ddof=1), n - 1, most) if len(each) else NONE


def _common(present: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every set of seeds that some pair of rows has in common: the seeds, the rows that have them
    all, and which pairs of those have no others in common."""
    if not present.any():
        return
    patterns, which = np.unique(present, axis=0, return_inverse=True)
    which = which.reshape(-1)
    both = patterns[:, None, :] & patterns[None, :, :]
    sets, of_pair = np.unique(both.reshape(-1, present.shape[1]), axis=0, return_inverse=True)
    of_pair = of_pair.reshape(len(patterns), len(patterns))
    for at, seeds in enumerate(sets):
        if seeds.any():
            members = np.flatnonzero((of_pair == at).any(axis=1)[which])
            pairs = (of_pair == at)[np.ix_(which[members], which[members])]
            yield np.flatnonzero(seeds), members, pairs


def _block(
    values: np.ndarray, cubes: Sequence[Cube], itemed: np.ndarray, prior: Prior
) -> Differences:
    """All pairs of rows that have the same seeds."""
    n = values.shape[1]
    each = values[:, None, :] - values[None, :, :]
    mean, blank = each.mean(axis=-1), np.full(each.shape[:2], np.nan)
    count, lent = np.full(mean.shape, n), np.full(mean.shape, prior.df)
    if n < 2:
        return Differences(mean, blank, blank, blank, lent, count)
    spread = np.sqrt(moderated(each.var(axis=-1, ddof=1), n - 1, prior))
    by_seed = spread**2 / n
    with_items = itemed[:, None] & itemed[None, :] if cubes else np.zeros(mean.shape, dtype=bool)
    by_item, residual, freedom = (np.zeros(mean.shape) for _ in range(3))
    for weight, cube in cubes:
        item, rest = _item_parts(np.where(itemed[:, None, None], cube, 0.0))
        item, rest = weight**2 * item, weight**2 * rest
        by_item += item
        residual += rest
        freedom += item**2 / (cube.shape[2] - 1)
        freedom += rest**2 / ((cube.shape[2] - 1) * (n - 1))
    by_item, residual, freedom = (
        np.where(with_items, part, 0.0) for part in (by_item, residual, freedom)
    )
    variance = np.maximum(by_seed + by_item - residual, np.maximum(by_seed, by_item))
    variance = np.maximum(variance, SMALLEST_ERROR**2)
    freedom += by_seed**2 / (n - 1 + prior.df)
    df = np.where(freedom > 0, variance**2 / np.where(freedom > 0, freedom, 1.0), n - 1)
    return Differences(mean, variance, np.clip(df, n - 1, MOST_FREEDOM), spread, lent, count)


def _item_parts(cube: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of all pairs: variance of the item means over n, and of the residual over S n."""
    rows, n_seeds, n_items = cube.shape
    items = cube.mean(axis=1)
    items = items - items.mean(axis=1, keepdims=True)
    rest = cube - cube.mean(axis=2, keepdims=True) - items[:, None, :]
    item = _squares(items) / ((n_items - 1) * n_items)
    residual = _squares(rest.reshape(rows, -1)) / ((n_items - 1) * (n_seeds - 1))
    return item, residual / (n_seeds * n_items)


def _squares(rows: np.ndarray) -> np.ndarray:
    """Sum of squared differences of all pairs of rows."""
    gram = rows @ rows.T
    own = np.diagonal(gram)
    return np.maximum(own[:, None] + own[None, :] - 2 * gram, 0.0)
