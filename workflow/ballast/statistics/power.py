"""How small a difference a table can find, and how large one is that means nothing."""

from __future__ import annotations

import numpy as np
from statsmodels.stats.power import TTestPower

from ballast.statistics.adjust import ALPHA

POWER = 0.8


def minimum_detectable(
    variance: np.ndarray, df: np.ndarray, alpha: float = ALPHA, power: float = POWER
) -> float | None:
    """The difference that a t test finds with this power, before correction, in points.

    variance: of the mean differences of pairs, df: of the test of each; both are pooled over the
    pairs. None if no pair has them. With seeds alone it is the paired t test's: variance is that of
    the differences over S, df S - 1.
    """
    known = ~np.isnan(variance)
    if not known.any():
        return None
    error = float(np.sqrt(variance[known].mean()))
    freedom = float(np.median(df[known]))
    size = _effect_size(freedom, alpha, power)
    return None if size is None else float(size * np.sqrt(freedom + 1) * error)


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
