"""How small a difference a table can find, and how large one is that means nothing."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from statsmodels.stats.power import TTestPower

from ballast.statistics.adjust import ALPHA
from ballast.statistics.crossed import Differences

POWER = 0.8


def minimum_detectable(
    test: Differences, alpha: float = ALPHA, power: float = POWER, typical: bool = False
) -> float | None:
    """The difference that pairs like these show with this power, before correction, in points.

    Variances are pooled over the pairs (typical: their median is taken, which rows that fail in
    some seeds do not dominate). Of the crossed test and the one over seeds, which must both agree,
    it is the larger. None if no pair has a variance.
    """
    known = ~np.isnan(test.variance)
    if not known.any():
        return None
    pooled = np.median if typical else np.mean
    found = []
    for error, df in test.errors():
        freedom = float(np.median(df[known]))
        size = _effect_size(round(freedom, 2), alpha, power)
        if size is not None:
            found.append(size * np.sqrt((freedom + 1) * pooled(error[known] ** 2)))
    return float(max(found)) if found else None


@lru_cache(maxsize=4096)
def _effect_size(df: float, alpha: float, power: float) -> float | None:
    """Of a t test with n = df + 1; None where the equation has no solution that can be found."""
    # The search of statsmodels starts too low for the effect sizes above 10 that n = 2 needs.
    problem = TTestPower()
    problem.start_bqexp["effect_size"] = {"low": 1e-8, "start_upp": 50.0}
    size = problem.solve_power(effect_size=None, nobs=df + 1, alpha=alpha, power=power)
    size = float(np.ravel(size)[0])
    reached = problem.power(size, df + 1, alpha)
    return size if abs(reached - power) < 1e-3 else None


def noise_floor(values: np.ndarray, share: float = 0.95) -> tuple[float | None, int]:
    """A/A: what two runs of one row with other seeds differ by in this share of cases, and of how
    many pairs of runs that is known. values: points, [row, seed], NaN where a row lacks a seed."""
    first, second = np.triu_indices(values.shape[1], k=1)
    gaps = np.abs(values[:, first] - values[:, second])
    gaps = gaps[~np.isnan(gaps)]
    if not len(gaps):
        return None, 0
    return float(np.quantile(gaps, share)), len(gaps)
