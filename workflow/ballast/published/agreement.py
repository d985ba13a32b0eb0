"""How far two orders of the same methods agree: Kendall's tau and its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEAST = 3  # fewer methods have no order worth a number
LEAST_INTERVAL = 5  # the variance of Fisher's z has n - 4 below the line


@dataclass(frozen=True)
class Agreement:
    """Kendall's tau-b of n pairs, its two-sided p against no association, and a 95 % interval.

    tau, p: None with fewer than `LEAST` pairs or where one side has only ties. low, high: None with
    fewer than `LEAST_INTERVAL` pairs, too.
    """

    n: int
    tau: float | None = None
    p: float | None = None
    low: float | None = None
    high: float | None = None


def agreement(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Agreement:
    """Agreement of two equally long sequences, in both of which higher is better.

    The interval is the asymptotic one of Fisher's z with Fieller's variance 0.437 / (n - 4)
    (Fieller, Hartley and Pearson 1957; Bonett and Wright 2000). Perfect agreement would give it no
    width, so tau enters with half a pair counted as discordant. The methods count as a sample; the
    noise of either side's scores is not in it.
    """
    x, y = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    n = len(x)
    if n < LEAST or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Agreement(n)
    found = stats.kendalltau(x, y)
    tau = max(-1.0, min(1.0, round(float(found.statistic), 12)))  # 1 is 1, not 1 - 2e-16
    low, high = _interval(tau, n, level) if n >= LEAST_INTERVAL else (None, None)
    return Agreement(n, tau, float(found.pvalue), low, high)


def _interval(tau: float, n: int, level: float) -> tuple[float, float]:
    most = 1 - 2 / (n * (n - 1))
    z = math.atanh(max(-most, min(most, tau)))
    half = stats.norm.ppf((1 + level) / 2) * math.sqrt(0.437 / (n - 4))
    return max(-1.0, min(math.tanh(z - half), tau)), min(1.0, max(math.tanh(z + half), tau))
