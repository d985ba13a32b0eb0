"""Whether the order of the rows depends on what is called best."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from ballast.measures import MEASURES

# Source and Target order rows as retention and E do, where the base is one.
DEFINITIONS = (
    "O", "H", "Avg", "cgm_average", "E", "retention", "headroom_gain", "forgetting_per_gain",
)  # fmt: skip


def definitions(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    """Values of the rows under each definition of best that they have, turned so that higher is
    better; by symbol (O, H, Avg, E) or title."""
    found = {}
    for name in DEFINITIONS:
        measure = MEASURES[name]
        if measure.column in rows:
            values = rows[measure.column].to_numpy(dtype=float, na_value=np.nan)
            title = name if len(name) <= 3 else measure.title
            found[title] = values if measure.better == "higher" else -values
    return found


def agreement(values: dict[str, np.ndarray]) -> pd.DataFrame:
    """Kendall's tau-b between the orders of the rows under each pair of definitions.

    Columns a, b, tau, n (rows that both can order); tau is missing where n < 2 or all rows tie.
    """
    found = []
    for a, b in combinations(values, 2):
        # Sums in another order differ by rounding, and would break ties.
        x, y = np.round(values[a], 6), np.round(values[b], 6)
        known = ~np.isnan(x) & ~np.isnan(y)
        tau = np.nan
        if known.sum() > 1:
            tau = float(stats.kendalltau(x[known], y[known]).statistic)
        found.append((a, b, tau, int(known.sum())))
    return pd.DataFrame(found, columns=["a", "b", "tau", "n"]).astype({"tau": float, "n": int})
