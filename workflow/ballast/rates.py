"""Learning rates found on validation: the table that `tune` writes and a suite reads.

Columns: base, target, method, variant, rank, learning_rate, seed, score (validation, points), loss
(validation, nats per token), status. The rate of a row's method is the one with the best mean
score; ties go to the lower loss, then to the smaller rate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from ballast.errors import SuiteError
from ballast.suite import Suite

KEYS = ["base", "target", "method", "variant", "rank"]
COLUMNS = [*KEYS, "learning_rate", "seed", "score", "loss", "status"]


def read_rates(path: Path) -> pd.DataFrame:
    """The curves as a table. Raises SuiteError if a column is missing."""
    table = pd.read_csv(path, dtype={"variant": str}, keep_default_na=True)
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing:
        raise SuiteError(f"{path}: column {missing[0]!r} is missing")
    table["variant"] = table["variant"].fillna("")
    table["rank"] = table["rank"].astype("Int64")
    return table


def best_rates(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method, rank and variant: the rate chosen, with its mean score and loss.

    A rate that failed on any seed is not chosen while another did not fail.
    """
    means = table.groupby([*KEYS, "learning_rate"], dropna=False).agg(
        score=("score", "mean"),
        loss=("loss", "mean"),
        failed=("status", lambda column: int((column != "ok").sum())),
    )
    order = means.reset_index().sort_values(
        ["failed", "score", "loss", "learning_rate"], ascending=[True, False, True, True]
    )
    return order.groupby(KEYS, dropna=False, sort=True).head(1).sort_values(KEYS)


def chosen_rates(suite: Suite) -> dict[tuple[Any, ...], float]:
    """Tuned rates of a suite by (base, target, method, variant, rank); empty without a table."""
    name = suite.config.get("learning_rates")
    if not name:
        return {}
    best = best_rates(read_rates(suite.folder / name))
    return {
        (*row[:4], None if pd.isna(row[4]) else int(row[4])): float(row[5])
        for row in best[[*KEYS, "learning_rate"]].itertuples(index=False, name=None)
    }
