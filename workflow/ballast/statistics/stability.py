"""Whether the order of the rows depends on what is called best.

Every definition takes Source and Target after tuning and of the base, in points, and is missing
where it has nothing to divide by.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats


def definitions(
    source: np.ndarray, target: np.ndarray, base_source: float, base_target: float, n_upstream: int
) -> dict[str, np.ndarray]:
    """Values of rows (or cells) under each definition, higher is better.

    E, O, Avg, H as in `tradeoff`; retention: S over that of the base (its order is F's); CGM's
    weighted average (T + N S) / (N + 1) over N upstream tasks and the target; headroom-normalised
    gain: the share of what could be learned that was, less the share of what was known that is
    forgotten; worse half: the lower of T and S.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        e, f = target - base_target, source - base_source
        both = source + target
        return {
            "E": e,
            "retention": _share(source, base_source),
            "O": e + f,
            "Avg": both / 2,
            "H": np.where(both > 0, 2 * source * target / both, np.nan),
            "CGM weighted average": (target + n_upstream * source) / (n_upstream + 1),
            "headroom-normalised gain": _share(e, 100 - base_target) + _share(f, base_source),
            "worse half": np.minimum(source, target),
        }


def _share(part: np.ndarray, whole: float) -> np.ndarray:
    return part / whole if whole > 0 else np.full(np.shape(part), np.nan)


def agreement(values: dict[str, np.ndarray]) -> pd.DataFrame:
    """Kendall's tau-b between the orders of the rows under each pair of definitions.

    Columns a, b, tau, n (rows that both can order); tau is missing where n < 2 or all rows tie.
    """
    found = []
    for a, b in combinations(values, 2):
        x, y = np.round(values[a], 6), np.round(values[b], 6)
        known = ~np.isnan(x) & ~np.isnan(y)
        tau = np.nan
        if known.sum() > 1:
            tau = float(stats.kendalltau(x[known], y[known]).statistic)
        found.append((a, b, tau, int(known.sum())))
    return pd.DataFrame(found, columns=["a", "b", "tau", "n"]).astype({"tau": float, "n": int})
