"""Learning rates: the cells that look for them, and their table.

They are found on the target's validation items alone. Upstream tasks are scored as well, on their
test items, so that a method's whole frontier over rates can be shown; no choice looks at those.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from ballast import tradeoff, versions
from ballast.files import key_of, replacing
from ballast.plan import COLUMNS, settings_that_count
from ballast.rates import COLUMNS as RATE_COLUMNS
from ballast.rates import EXTRA, KEYS, best_rates, tuning_table
from ballast.suite import Suite

# learning_rate_source of a cell of the grid; the second is the grid's start.
GRID, DEFAULT = "grid", "grid, default"


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
                rate = float(f"{start * factor:.4g}")
                rows.append(_cell(row, spec, rate, seed, factor == 1))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"rank": "Int64"})


# Targets on what rates are chosen by; upstream tasks on what the results are scored on.
SPLITS = {"target": "validation", "upstream": "test"}


def _cell(
    row: pd.Series, spec: dict[str, Any], rate: float, seed: int, default: bool
) -> dict[str, Any]:
    own = spec | {
        "learning_rate": rate,
        "learning_rate_source": DEFAULT if default else GRID,
        "seed": seed,
        "split": SPLITS["target"],
        "tasks": {
            name: entry | {"split": SPLITS[entry["role"]]}
            for name, entry in spec["tasks"].items()
            if entry["role"] in SPLITS
        },
    }
    own["folder"] = f"{spec['suite']}/tune"
    keys = _keys(own)
    slug = row["id"].rpartition(".s")[0]
    return {
        **row.to_dict(),
        "id": f"{slug}.lr{rate:g}.s{seed}-{key_of(keys, length=8)}",
        "seed": seed,
        "train_key": key_of(keys),
        "eval_key": key_of([row["eval_key"], SPLITS]),
        "spec": json.dumps(own, sort_keys=True),
    }


def _keys(spec: dict[str, Any]) -> list[Any]:
    """What a cell of the grid is trained from.

    Not the key of the suite's own cell, which holds the rate in use: cells of the grid would not be
    known again once their result has been adopted.
    """
    data = [entry["train_key"] for entry in spec["tasks"].values() if entry["role"] == "target"]
    return [settings_that_count(spec), versions.TRAIN, data]


def rates_table(records: list[dict[str, Any]]) -> pd.DataFrame:
    """The curves of `tune` as a table, one row per cell; failed cells have no score.

    E is on validation items (against the untouched base on the same), F on the upstream tasks'
    test items; both are missing in cells that scored no upstream task.
    """
    rows = []
    for record in records:
        who = record["identity"]
        scores = _of_role(record, "target")
        whole = record["status"] == "ok" and bool(_of_role(record, "upstream"))
        measures = tradeoff.of_record(record) if whole else {}
        rows.append(
            {
                **{key: who[key] for key in KEYS},
                "learning_rate": record["settings"]["learning_rate"],
                "seed": who["seed"],
                "score": fmean(score["value"] for score in scores) if scores else None,
                "loss": fmean(score["loss"] for score in scores) if scores else None,
                "status": record["status"],
                "E": measures.get("E"),
                "F": measures.get("F"),
                "default": record["settings"].get("learning_rate_source") == DEFAULT,
            }
        )
    table = pd.DataFrame(rows, columns=[*RATE_COLUMNS, *EXTRA]).astype({"rank": "Int64"})
    table = table.astype(dict.fromkeys(("score", "loss", "E", "F"), float))
    return table.sort_values([*KEYS, "learning_rate", "seed"], na_position="first")


def _of_role(record: dict[str, Any], role: str) -> list[dict[str, Any]]:
    return [s for name, s in record["scores"].items() if record["tasks"][name]["role"] == role]


def write_rates(records: list[dict[str, Any]], path: Path) -> pd.DataFrame:
    """Write the curves as CSV, scores rounded to what they mean; returns the rates chosen."""
    table = rates_table(records).round({"score": 3, "loss": 5, "E": 3, "F": 3})
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
    return best_rates(table)


def write_tuning(rates: pd.DataFrame, path: Path) -> None:
    """Write what tuning gave each method (`rates.tuning_table`) as CSV, points rounded."""
    points = dict.fromkeys(("default", "tuned", "gain", "sensitivity", "F.default", "F.tuned"), 3)
    with replacing(path) as temporary:
        tuning_table(rates).round(points).to_csv(temporary, index=False, lineterminator="\n")
