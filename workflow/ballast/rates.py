"""Learning rates found on validation: the table that `tune` writes and a suite reads.

Columns: base, target, method, variant, rank, learning_rate, seed, score (validation, points), loss
(validation, nats per token), status; in files of newer runs also E (validation, points), F (the
upstream tasks' test items, points) and default (whether it is the rate that the grid starts from:
the suite's start for the method, or the method's own default). The rate of a row's method is the
one with the best mean score; ties go to the lower loss, then to the smaller rate. E, F and default
have no part in that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from ballast.errors import SuiteError
from ballast.suite import Suite

TABLE = "learning_rates.csv"  # as `tune` and `keep` write it
KEYS = ["base", "target", "method", "variant", "rank"]
COLUMNS = [*KEYS, "learning_rate", "seed", "score", "loss", "status"]
EXTRA = ["E", "F", "default"]


def read_rates(path: Path) -> pd.DataFrame:
    """The curves as a table; what EXTRA columns a file lacks is missing in all rows.

    Raises SuiteError if another column is missing.
    """
    table = pd.read_csv(path, dtype={"variant": str}, keep_default_na=True)
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing:
        raise SuiteError(f"{path}: column {missing[0]!r} is missing")
    table["variant"] = table["variant"].fillna("")
    table = table.reindex(columns=[*table.columns, *(c for c in EXTRA if c not in table.columns)])
    numbers = dict.fromkeys(("score", "loss", "E", "F"), float)
    return table.astype({"rank": "Int64", "default": "boolean"} | numbers)


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


TUNING = (
    *KEYS, "rates", "seeds", "failed", "default_rate", "default", "rate", "tuned", "gain",
    "sensitivity", "at_edge", "F.default", "F.tuned",
)  # fmt: skip


def tuning_table(rates: pd.DataFrame) -> pd.DataFrame:
    """What tuning gave each method, one row per method, rank, variant, base and target.

    Columns: KEYS; rates and seeds (how many), failed (cells); default_rate, default (its mean
    validation score, points); rate, tuned (those chosen by `best_rates`); gain (tuned - default);
    sensitivity (points: how much lower than the best rate's score that of a rate taken from the
    grid at random is, on average; >= 0, 0 = any rate will do); at_edge (the chosen rate is the
    grid's first or last of several: a better one may lie beyond); F.default, F.tuned (points).
    A cell that failed left the base as it was: in `sensitivity` it counts with the base's score
    where E tells it, else not at all. What is not known is missing.
    """
    rates = rates.reindex(columns=[*COLUMNS, *EXTRA])
    rows = [
        dict(zip(KEYS, who, strict=True)) | _tuning(block)
        for who, block in rates.groupby(KEYS, dropna=False, sort=True)
    ]
    numbers = [k for k in TUNING if k not in (*KEYS, "rates", "seeds", "failed", "at_edge")]
    kinds = {"rank": "Int64", "at_edge": bool} | dict.fromkeys(numbers, float)
    return pd.DataFrame(rows, columns=list(TUNING)).astype(kinds)


def _tuning(block: pd.DataFrame) -> dict[str, Any]:
    """The row of one method, rank and variant, from its cells."""
    best = best_rates(block).iloc[0]
    means = block.groupby("learning_rate")[["score", "F"]].mean()
    start = block.loc[block["default"].fillna(False).astype(bool), "learning_rate"].min()
    default = means.loc[start] if pd.notna(start) else pd.Series({"score": None, "F": None})
    tuned = means.loc[best["learning_rate"]]
    ends = (means.index.min(), means.index.max())
    return {
        "rates": len(means),
        "seeds": block["seed"].nunique(),
        "failed": int((block["status"] != "ok").sum()),
        "default_rate": start,
        "default": default["score"],
        "rate": best["learning_rate"],
        "tuned": tuned["score"],
        "gain": tuned["score"] - default["score"] if pd.notna(start) else None,
        "sensitivity": _sensitivity(block),
        "at_edge": len(means) > 1 and best["learning_rate"] in ends,
        "F.default": default["F"],
        "F.tuned": tuned["F"],
    }


def _sensitivity(block: pd.DataFrame) -> float:
    """Mean over the grid's rates of (the best rate's score - its own), points."""
    base = (block["score"] - block["E"]).mean()
    scores = block["score"].where(block["status"] == "ok", base)
    by_rate = scores.groupby(block["learning_rate"]).mean().dropna()
    return float((by_rate.max() - by_rate).mean())
