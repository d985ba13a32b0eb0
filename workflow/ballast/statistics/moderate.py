"""Variances over a few seeds, steadied by those of a table's other pairs of rows.

Three seeds leave a variance two degrees of freedom, and a test that has to stand a correction for
all pairs of a table finds almost nothing with them. But the pairs of a table know something of each
other: if their variances are alike, each can lend from all; if they are not, hardly. How alike they
are is estimated from the variances themselves (empirical Bayes): a variance s2 with d degrees of
freedom becomes

    (d0 s02 + d s2) / (d0 + d),    with d0 + d degrees of freedom,

where true variances scatter about s02 as d0 / chi2(d0) does. Source: Smyth 2004, "Linear models and
empirical Bayes methods for assessing differential expression" (limma), whose estimates of d0 and
s02 by the moments of log variances are used here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import optimize, special

# Pairs share rows, so that d0 is known less well than from as many independent variances; with half
# of it, tests keep their size where rows vary very differently (simulated in the tests).
BELIEVED = 0.5
# Variances below this share of the median are rounding, or seeds that agree by a ceiling.
SMALLEST_SHARE = 1e-5


class Prior(NamedTuple):
    """df: d0, 0 where variances have nothing in common; variance: s02, in points squared."""

    df: float
    variance: float


NONE = Prior(0.0, 0.0)


def prior_of(variances: np.ndarray, df: np.ndarray, most: float) -> Prior:
    """The prior of variances, [pair], with their degrees of freedom.

    most: the largest d0 that is believed: what the other comparisons of the table can tell, as its
    pairs share their rows. NONE for fewer than three variances.
    """
    known = np.isfinite(variances) & (df > 0)
    variances, df = variances[known], df[known].astype(float)
    median = np.median(variances) if len(variances) else 0.0
    if len(variances) < 3 or median <= 0 or most <= 0:
        return NONE
    logs = np.log(np.maximum(variances, SMALLEST_SHARE * median))
    logs += np.log(df / 2) - special.digamma(df / 2)
    excess = logs.var(ddof=1) - special.polygamma(1, df / 2).mean()
    d0 = most if excess <= special.polygamma(1, most / 2) else 2 * _inverse_trigamma(excess)
    center = logs.mean() + special.digamma(d0 / 2) - np.log(d0 / 2)
    return Prior(float(BELIEVED * d0), float(np.exp(center)))


def moderated(variance: np.ndarray, df: float, prior: Prior) -> np.ndarray:
    """Variances, any shape, drawn towards the prior's."""
    return (prior.df * prior.variance + df * variance) / (prior.df + df)


def _inverse_trigamma(value: float) -> float:
    """x > 0 with trigamma(x) = value > 0."""
    return float(optimize.brentq(lambda x: special.polygamma(1, x) - value, 1e-6, 1e6, xtol=1e-10))
