"""Ranks that rows may hold, given which of them can be told apart."""

from __future__ import annotations

import numpy as np

from ballast.statistics.adjust import ALPHA


def rank_spans(
    difference: np.ndarray, p_adjusted: np.ndarray, ranked: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest rank of each row, 1 is best, NaN for rows that are not ranked.

    difference: a - b, higher is better; p_adjusted: of no difference, [row, row] both. A row is
    below those that are significantly better and above those that are significantly worse.
    """
    both = ranked[:, None] & ranked[None, :]
    apart = both & (np.nan_to_num(p_adjusted, nan=1.0) < ALPHA)
    better = (apart & (difference < 0)).sum(axis=1)
    worse = (apart & (difference > 0)).sum(axis=1)
    return (
        np.where(ranked, 1.0 + better, np.nan),
        np.where(ranked, float(ranked.sum()) - worse, np.nan),
    )
