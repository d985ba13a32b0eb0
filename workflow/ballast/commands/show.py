"""`ballast show`: all that is known of a cell, or of a row over its seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ballast.commands.source import Named, at_place, chosen_places, find
from ballast.community import read_community_changes
from ballast.files import read_json
from ballast.items import CHANGES
from ballast.keep import read_kept_changes
from ballast.records import beside
from ballast.results import Results
from ballast.statistics.analysis import COMPARED, analyse
from ballast.statistics.rows import row_keys
from ballast.tables.notes import row_name

COSTS = (
    "trainable_parameters", "total_parameters", "adapter_bytes", "tokens", "steps", "step_ms",
    "first_step_seconds", "seconds.train", "seconds.evaluate", "seconds.total", "memory_mb.train",
    "memory_mb.evaluate",
)  # fmt: skip


def describe(
    results: Results,
    name: str,
    base: str | None = None,
    target: str | None = None,
    samples: int = 3,
    kept: Path | None = None,
) -> dict[str, Any]:
    """What `name` stands for: one cell, or a row in every base and target that has it.

    samples: how many gained and how many lost items of each task are given, where they are kept;
    kept: the folder of a kept suite, which has some.
    """
    named = find(results, name)
    places = chosen_places([n.place for n in named], base, target)
    here = [n for n in named if n.place in places]
    found = [_cell(results, n, samples, kept) if n.cell else _row(results, n) for n in here]
    return {"format": 1, "command": "show", "suite": results.suite, "shown": found}


def _identity(row: pd.Series) -> dict[str, Any]:
    keys = ("base", "target", "method", "title", "family", "variant", "rank")
    return {"name": row_name(row), **{key: row[key] for key in keys}}


def _cell(results: Results, named: Named, samples: int, kept: Path | None) -> dict[str, Any]:
    row = results.table.set_index("id", drop=False).loc[named.cell]
    record = results.records.get(named.cell)
    found = {
        "kind": "cell",
        "id": named.cell,
        "key": named.key,
        **_identity(row),
        "seed": row["seed"],
        "parents": (row["parents"] or "").split() if isinstance(row["parents"], str) else [],
        "origin": row.get("origin"),
        "status": row["status"],
        "reason": row["reason"],
        "scored": row["scored"],
        "measures": {k: row[k] for k in (*COMPARED, "source_mean", "target_mean", "Avg", "H")},
        "tasks": [],
        "costs": {name: row[name] for name in COSTS},
        "drift": _block(row, "drift."),
        "settings": _settings(row, record),
        "report": _block(row, "report."),
        "provenance": _provenance(record),
        "samples": {},
    }
    if record is not None:
        found["tasks"] = _tasks(row, record)
        found["samples"] = _first(_changed(results, named.cell, kept), samples)
    return found


def _block(row: pd.Series, prefix: str) -> dict[str, Any]:
    """The numbers of columns that begin so, those that there are."""
    names = [name for name in row.index if name.startswith(prefix)]
    return {name.removeprefix(prefix): row[name] for name in names if pd.notna(row[name])}


def _settings(row: pd.Series, record: Mapping[str, Any] | None) -> dict[str, Any]:
    if record is not None:
        return dict(record["settings"])
    given = {
        key: row[key] for key in ("learning_rate", "learning_rate_source", "scale", "connector")
    }
    return given | {"hyper": json.loads(row["hyper"])}


def _provenance(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Where a record was made. Whatever else stands there belongs to the data and the base."""
    if record is None:
        return {}
    known = {
        key: value
        for key, value in record["provenance"].items()
        if key not in ("base", "data") and not isinstance(value, (dict, list))
    }
    packages = record["provenance"].get("packages")
    return known | {
        "packages": packages if isinstance(packages, dict) else {},
        "keys": record["keys"],
    }


def _tasks(row: pd.Series, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every task with its score, the base's, and what became of its items; target first."""
    order = {"target": 0, "upstream": 1, "probe": 2}
    churn = record.get("churn") or {}
    found = []
    for name, task in sorted(record["tasks"].items(), key=lambda t: (order[t[1]["role"]], t[0])):
        score, before = (record[k].get(name) or {} for k in ("scores", "base_scores"))
        ok = row["status"] == "ok"
        after = score.get("value") if ok else None
        known = after is not None and before.get("value") is not None
        found.append(
            {
                "task": name,
                **{
                    key: task[key]
                    for key in ("title", "role", "metric", "unit", "direction", "chance")
                },
                "n": score.get("n"),
                "base": before.get("value"),
                "score": after,
                "change": after - before["value"] if known else None,
                "loss_change": row.get(f"dce.{name}"),
                "churn": {k: v for k, v in churn.get(name, {}).items() if k != "subjects"}
                if ok
                else {},
            }
        )
    return found


def _changed(results: Results, cell: str, kept: Path | None) -> dict[str, dict[str, list[Any]]]:
    """Items gained and forgotten, by task and kind, wherever they are stored."""
    if results.folder is not None:
        record = results.records.get(cell)
        folder = results.folder / "cells" / cell
        path = beside(folder, record, CHANGES) if record and ":" not in cell else None
        if path is not None:
            return read_json(path)
        if ":" not in cell:
            return {}
        table = read_community_changes(results.folder)
    elif kept is not None:
        table = read_kept_changes(kept)
    else:
        return {}
    found: dict[str, dict[str, list[Any]]] = {}
    mine = table[table["cell"] == cell]
    for task, kind, entry in mine[["task", "kind", "entry"]].itertuples(index=False):
        found.setdefault(task, {}).setdefault(kind, []).append(entry)
    return found


def _first(changes: dict[str, dict[str, list[Any]]], most: int) -> dict[str, Any]:
    kinds = ("gained", "forgotten")
    found = {
        task: {kind: lists.get(kind, [])[:most] for kind in kinds}
        for task, lists in changes.items()
    }
    return {task: lists for task, lists in found.items() if any(lists.values())}


def _row(results: Results, named: Named) -> dict[str, Any]:
    analysis = analyse(results, *named.place)
    row = analysis.rows.loc[named.key]
    here = at_place(results, named.place).table
    cells = here[pd.Series(row_keys(here), here.index) == named.key].sort_values("seed")
    first = cells.iloc[0]
    return {
        "kind": "row",
        "key": named.key,
        **_identity(first),
        "seeds": list(row["seeds"]),
        "planned": row["n_planned"],
        "note": row["note"],
        "control": analysis.control,
        "rows": len(analysis.rows),
        "front": row["front"],
        "measures": {name: _measure(row, name) for name in COMPARED},
        "tasks": _row_tasks(row, cells),
        "costs": {name: _spread(row, name) for name in COSTS if name in row},
        "drift": {
            name.removeprefix("drift."): _spread(row, name)
            for name in here
            if name.startswith("drift.") and name in row
        },
        "settings": {
            "learning_rate": sorted(set(cells["learning_rate"].dropna())),
            "learning_rate_source": sorted(set(cells["learning_rate_source"].dropna())),
            "hyper": json.loads(first["hyper"]),
        },
        "cells": [
            {key: cell[key] for key in ("id", "seed", "status", "reason", *COMPARED)}
            for cell in cells.to_dict("records")
        ],
        "facts": {k: v for k, v in analysis.facts.items() if k.split(".")[0] in COMPARED},
    }


def _spread(row: pd.Series, name: str) -> dict[str, Any]:
    return {
        "mean": row[name],
        **{key: row.get(f"{name}.{key}") for key in ("sd", "low", "high")},
    }


def _measure(row: pd.Series, name: str) -> dict[str, Any]:
    keys = ("diff", "diff_low", "diff_high", "p", "p_adjusted", "p_base", "p_base_adjusted",
            "rank_low", "rank_high")  # fmt: skip
    return _spread(row, name) | {key: row[f"{name}.{key}"] for key in keys}


def _row_tasks(row: pd.Series, cells: pd.DataFrame) -> list[dict[str, Any]]:
    facts: dict[str, Any] = {}
    for text in cells.sort_values("status", key=lambda s: s != "ok")["tasks"]:
        facts = json.loads(text) | facts
    order = {"target": 0, "upstream": 1, "probe": 2}
    return [
        {
            "task": name,
            **{
                key: task[key] for key in ("title", "role", "metric", "unit", "direction", "chance")
            },
            "n": task["n"],
            "base": row.get(f"base.{name}"),
            "score": _spread(row, f"score.{name}") if f"score.{name}" in row else None,
            "loss_change": row.get(f"dce.{name}"),
        }
        for name, task in sorted(facts.items(), key=lambda t: (order[t[1]["role"]], t[0]))
    ]
