"""What repeated seeds say of a number: t intervals, paired by seed where two rows are compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
# Below this a standard error of points is rounding: equal means of different sums differ by 1e-14.
SMALLEST_ERROR = 1e-6


@dataclass(frozen=True)
class Spread:
    """Mean, sd (n - 1) and interval along the last axis; n: numbers in each.

    sd, low and high are NaN where n < 2: one seed says nothing of others.
    """

    mean: np.ndarray
    sd: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray


@dataclass(frozen=True)
class Bootstrap:
    """A percentile interval with what must be said of it."""

    low: float
    high: float
    draws: int
    note: str


@dataclass(frozen=True)
class Paired:
    """A difference a - b over the seeds that both have: interval and p of the paired t test."""

    difference: float
    low: float
    high: float
    p: float
    n: int


def t_interval(values: np.ndarray, level: float = LEVEL) -> Spread:
    """t interval of the mean over the last axis, of which NaN are left out."""
    values = np.asarray(values, dtype=float)
    known = ~np.isnan(values)
    n = known.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(known, values, 0.0).sum(axis=-1) / np.where(n, n, np.nan)
        squares = np.where(known, values - mean[..., None], 0.0) ** 2
        sd = np.sqrt(squares.sum(axis=-1) / np.where(n > 1, n - 1, np.nan))
        half = quantile(n - 1, level) * sd / np.sqrt(n)
    return Spread(mean, sd, mean - half, mean + half, n)


def quantile(df: np.ndarray, level: float = LEVEL) -> np.ndarray:
    """Two-sided quantile of t, NaN where there are no degrees of freedom."""
    df = np.asarray(df, dtype=float)
    usable = df > 0
    return np.where(usable, stats.t.ppf(0.5 + level / 2, np.where(usable, df, 1.0)), np.nan)


def paired(a: np.ndarray, b: np.ndarray, level: float = LEVEL) -> Paired:
    """Compare two rows, [seed] each, NaN where a row lacks that seed, by a t test paired by seed.

    low, high and p are NaN with fewer than two seeds in common.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    spread = t_interval(difference, level)
    n = int(spread.n)
    if n < 2:
        return Paired(float(spread.mean), np.nan, np.nan, np.nan, n)
    error = max(float(spread.sd) / np.sqrt(n), SMALLEST_ERROR)
    p = 2 * stats.t.sf(abs(float(spread.mean)) / error, n - 1)
    return Paired(float(spread.mean), float(spread.low), float(spread.high), float(p), n)


def bootstrap_interval(
    values: np.ndarray, draws: int = 2000, level: float = LEVEL, seed: int = 0
) -> Bootstrap | None:
    """Percentile bootstrap of a mean over seeds, with a note of how little it covers; None for one
    seed. Resampled means vary by (n - 1) / n of the variance and have lighter tails than t."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return None
    draw = np.random.default_rng(seed)
    means = draw.choice(np.sort(values), size=(draws, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    n = len(values)
    note = f"bootstrap over {n} seeds covers less than {level:.0%}"
    if n <= 10:
        width = stats.norm.ppf(0.5 + level / 2) * np.sqrt((n - 1) / n)
        covered = 2 * stats.t.cdf(width, n - 1) - 1
        note += f" (about {covered:.0%})"
    return Bootstrap(float(low), float(high), draws, note)
