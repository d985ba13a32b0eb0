"""p values corrected for how many there are."""

from __future__ import annotations

import numpy as np
from statsmodels.stats.multitest import multipletests

ALPHA = 0.05


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's p values: the chance of any false claim stays below alpha. NaN stay and count not."""
    return _adjusted(p, "holm")


def benjamini_hochberg(p: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's: at most alpha of the claims are expected to be false."""
    return _adjusted(p, "fdr_bh")


def _adjusted(p: np.ndarray, method: str) -> np.ndarray:
    p = np.asarray(p, dtype=float)
    found, known = np.full(p.shape, np.nan), ~np.isnan(p)
    if known.any():
        found[known] = multipletests(p[known], alpha=ALPHA, method=method)[1]
    return found
