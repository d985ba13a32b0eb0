"""Forecast of a suite's remaining time: from finished cells, else from FLOPs."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pandas as pd

# Before anything has run: interpreter and imports, then steps and items of a small base, one core.
START_SECONDS, STEP_SECONDS, ITEM_SECONDS = 7.0, 0.03, 0.003


def forecast_seconds(due: pd.DataFrame, records: list[dict[str, Any]]) -> tuple[float, bool]:
    """Core-seconds that the cells of `due` may take, and whether finished cells say so.

    A cell costs the median of finished ones of its base and method, else of its base, else a guess.
    """
    spent: dict[tuple[str, str], list[float]] = {}
    for record in records:
        total = record["costs"]["seconds"].get("total")
        if record["status"] == "ok" and total:
            base, method = record["identity"]["base"], record["identity"]["method"]
            for key in ((base, method), (base, "")):
                spent.setdefault(key, []).append(total)
    total, measured = 0.0, 0
    for _, row in due.iterrows():
        times = spent.get((row["base"], row["method"])) or spent.get((row["base"], ""))
        measured += bool(times)
        total += statistics.median(times) if times else _guess(row)
    return total, measured * 2 > len(due)


def _guess(row: pd.Series) -> float:
    spec = json.loads(row["spec"])
    items = sum(task["sizes"]["test"] for task in spec["tasks"].values())
    steps = 0 if row["posthoc"] else spec["training"]["steps"] * spec["training"]["accumulation"]
    return START_SECONDS + steps * STEP_SECONDS + items * ITEM_SECONDS
