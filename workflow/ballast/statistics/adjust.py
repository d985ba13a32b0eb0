"""p values corrected for how many there are."""

from __future__ import annotations

import numpy as np
from statsmodels.stats.multitest import multipletests

ALPHA = 0.05


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's p values: the chance of any false claim stays below alpha. NaN stay and count not."""
    # Equal to statsmodels', whose own collects garbage at every call: 0.1 s in a large process.
    p = np.asarray(p, dtype=float)
    found, order = np.full(p.shape, np.nan), np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    steps = p[order] * np.arange(len(order), 0, -1)
    found[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return found


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's: at most alpha of the claims are expected to be false."""
    p = np.asarray(p, dtype=float)
    found, known = np.full(p.shape, np.nan), ~np.isnan(p)
    if known.any():
        found[known] = multipletests(p[known], alpha=ALPHA, method="fdr_bh")[1]
    return found
