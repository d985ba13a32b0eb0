"""Learning rates: the cells that look for them, on validation items only, and their table."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from ballast.files import key_of, replacing
from ballast.plan import COLUMNS
from ballast.rates import COLUMNS as RATE_COLUMNS
from ballast.rates import KEYS, best_rates
from ballast.suite import Suite


def make_tune_plan(suite: Suite, plan: pd.DataFrame) -> pd.DataFrame:
    """Cells of `tune`: each trained method, rank and variant at every rate of its grid.

    The grid is the suite's factors around its start for the method, or around the method's own
    default; every method gets the same number of points and the same seeds, none of them a seed of
    the suite's results.
    """
    tuning = suite.config["tuning"]
    trained = plan[~plan["posthoc"].astype(bool)]
    first = trained.drop_duplicates(KEYS)
    rows: list[dict[str, Any]] = []
    for _, row in first.iterrows():
        spec = json.loads(row["spec"])
        default, _ = suite.methods[row["method"]].learning_rate(spec["hyper"])
        start = tuning["start"].get(row["method"], default)
        for factor in tuning["factors"]:
            for seed in tuning["seeds"]:
                rows.append(_cell(row, spec, float(f"{start * factor:.4g}"), seed))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"rank": "Int64"})


def _cell(row: pd.Series, spec: dict[str, Any], rate: float, seed: int) -> dict[str, Any]:
    own = spec | {
        "learning_rate": rate,
        "learning_rate_source": "grid",
        "seed": seed,
        "split": "validation",
        "tasks": {k: entry for k, entry in spec["tasks"].items() if entry["role"] == "target"},
    }
    own["folder"] = f"{spec['suite']}/tune"
    keys = [row["train_key"], rate, seed]
    slug = row["id"].rpartition(".s")[0]
    return {
        **row.to_dict(),
        "id": f"{slug}.lr{rate:g}.s{seed}-{key_of(keys, length=8)}",
        "seed": seed,
        "train_key": key_of(keys),
        "eval_key": key_of([row["eval_key"], "validation"]),
        "spec": json.dumps(own, sort_keys=True),
    }


def rates_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """The curves of `tune` as a table, one row per cell; failed cells have no score."""
    rows = []
    for record in records:
        who, scores = record["identity"], list(record["scores"].values())
        rows.append(
            {
                **{key: who[key] for key in KEYS},
                "learning_rate": record["settings"]["learning_rate"],
                "seed": who["seed"],
                "score": fmean(score["value"] for score in scores) if scores else None,
                "loss": fmean(score["loss"] for score in scores) if scores else None,
                "status": record["status"],
            }
        )
    table = pd.DataFrame(rows, columns=RATE_COLUMNS).astype({"rank": "Int64"})
    return table.sort_values([*KEYS, "learning_rate", "seed"], na_position="first")


def write_rates(records: list[dict[str, Any]], path: Path) -> pd.DataFrame:
    """Write the curves as CSV, scores rounded to what they mean; returns the rates chosen."""
    table = rates_table(records).round({"score": 3, "loss": 5})
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    return best_rates(table)
