"""The tidy table: one row per cell, from records and the plan. All else is made from it.

Names of its columns are explained in results/README.md. A number stands only where it may be used:
scores, losses and measures in rows whose status is ok, costs in rows that have a current record.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from ballast import tradeoff
from ballast.declare import FAMILIES
from ballast.measures import derived
from ballast.records import status_of

Record = dict[str, Any]
PHASES = ("start", "load", "attach", "train", "merge", "evaluate", "total")
TEXT = (
    "id", "suite", "base", "target", "method", "title", "family", "variant", "rank", "seed",
    "parents", "status", "reason", "scored", "learning_rate", "learning_rate_source", "scale",
    "connector", "origin", "hyper", "tasks",
)  # fmt: skip
COSTS = (
    "trainable_parameters", "total_parameters", "adapter_bytes", "tokens",
    *(f"seconds.{phase}" for phase in PHASES), "first_step_seconds", "step_ms",
    "memory_mb.train", "memory_mb.evaluate", "steps", "first_loss", "last_loss",
)  # fmt: skip
# Measures beyond those of `tradeoff.of_record`, see `measures.derived`.
DERIVED = ("cgm_average", "retention", "forgetting_per_gain", "headroom_gain")
MEASURES = (*tradeoff.MEASURES, *DERIVED)
COUNTS = (
    "rank", "seed", "trainable_parameters", "total_parameters", "adapter_bytes", "tokens", "steps",
)  # fmt: skip
NUMBERS = ("learning_rate", "scale")


def tidy(records: Iterable[Record], plan: pd.DataFrame | None = None) -> pd.DataFrame:
    """One row per cell, planned or recorded, sorted by base, target, family, method, rank and seed.

    status is ok, failed, stale, rescore or missing as in `records.status_of`; or `unplanned`, for a
    record of our own that the plan does not have (the suite has changed). Without a plan nothing
    can be missing or stale. Task columns (TASK stands for its name): score.TASK and base.TASK in
    the task's unit, n.TASK items, dce.TASK the change of its loss in nats per token (positive =
    worse), churn.TASK.KIND counts of items, extra.TASK.NAME and base_extra.TASK.NAME; drift.NAME as
    in `measures`. `tasks` and `hyper` are JSON.
    """
    by_id = {record["id"]: record for record in records}
    rows = []
    if plan is not None:
        for cell in plan.to_dict("records"):
            record = by_id.pop(cell["id"], None)
            rows.append(_planned(cell, record))
    for record in by_id.values():
        own = plan is not None and not record.get("origin")
        rows.append(_recorded(record, "unplanned" if own else record["status"]))
    return _frame(rows)


def _planned(cell: dict[str, Any], record: Record | None) -> dict[str, Any]:
    status = status_of(cell, record)
    if record is not None:
        return _recorded(record, status)
    spec = json.loads(cell["spec"])
    rank = cell["rank"]
    return {
        "suite": spec.get("suite"),
        **{key: cell[key] for key in ("id", "base", "target", "method", "variant", "parents")},
        "rank": None if pd.isna(rank) else int(rank),
        "seed": int(cell["seed"]),
        "title": spec.get("title") or cell["method"],
        "family": spec.get("family"),
        "status": status,
        "reason": "not run yet",
        **{k: spec.get(k) for k in ("learning_rate", "learning_rate_source", "connector")},
        "hyper": _json(spec.get("hyper", {})),
        "tasks": "{}",
    }


_REASONS = {
    "stale": "made under other settings, data or code",
    "rescore": "scored under another definition of its tasks",
    "unplanned": "not in the suite's plan any more",
}


def _recorded(record: Record, status: str) -> dict[str, Any]:
    identity, settings = record["identity"], record["settings"]
    failure = record["failure"]
    reason = _REASONS.get(status)
    if status == "failed":
        reason = f"{failure['kind']}: {failure['reason']}"
    row = {
        "id": record["id"],
        **{
            k: identity[k] for k in ("suite", "base", "target", "method", "variant", "rank", "seed")
        },
        "parents": " ".join(identity["parents"]),
        "title": record["method"]["title"],
        "family": record["method"]["family"],
        "status": status,
        "reason": reason,
        "scored": record["scored"],
        **{
            k: settings.get(k)
            for k in ("learning_rate", "learning_rate_source", "scale", "connector")
        },
        "origin": record.get("origin", ""),
        "hyper": _json(settings["hyper"]),
        "tasks": _json({k: _task(record, k) for k in sorted(record["tasks"])}),
    }
    if status in ("ok", "failed", "rescore"):
        row |= _costs(record)
    if status == "ok":
        row |= tradeoff.of_record(record) | derived(record) | _scores(record)
    return row


def _task(record: Record, name: str) -> dict[str, Any]:
    base = record["base_scores"].get(name, {})
    return record["tasks"][name] | {"n": base.get("n"), "base_loss": base.get("loss")}


def _costs(record: Record) -> dict[str, Any]:
    costs, curve = record["costs"], record["curve"] or {}
    flat = {k: v for k, v in costs.items() if not isinstance(v, dict)}
    for block in ("seconds", "memory_mb"):
        flat |= {f"{block}.{k}": v for k, v in (costs.get(block) or {}).items()}
    flat = {key: flat.get(key) for key in COSTS}
    flat |= {key: curve.get(key) for key in ("steps", "first_loss", "last_loss")}
    return flat | {f"report.{k}": v for k, v in record["report"].items()}


def _scores(record: Record) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in record["tasks"]:
        after, before = record["scores"][name], record["base_scores"][name]
        row[f"score.{name}"], row[f"base.{name}"] = after["value"], before["value"]
        row[f"n.{name}"] = after["n"]
        change = tradeoff.delta_ce(after["loss"], before["loss"])
        if change is not None:
            row[f"dce.{name}"] = change
        for prefix, score in (("extra", after), ("base_extra", before)):
            extras = {k: v for k, v in score.items() if k not in ("value", "n", "loss")}
            row |= {f"{prefix}.{name}.{k}": v for k, v in extras.items() if v is not None}
    for name, counts in record.get("churn", {}).items():
        row |= {f"churn.{name}.{k}": v for k, v in counts.items() if k != "subjects"}
    return row | {f"drift.{k}": v for k, v in record.get("drift", {}).items()}


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


_GROUPS = ("score", "base", "dce", "drift", "n", "churn", "extra", "base_extra", "report")


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """The rows sorted, with columns in a fixed order and with fixed types."""
    fixed = [*TEXT, *MEASURES, *COSTS]
    other = sorted({key for row in rows for key in row} - set(fixed), key=_column_order)
    rows = sorted(rows, key=_row_order)
    table = {}
    for name in [*TEXT, *MEASURES, *(k for k in other if not k.startswith("report."))]:
        table[name] = [row.get(name) for row in rows]
    for name in [*COSTS, *(k for k in other if k.startswith("report."))]:
        table[name] = [row.get(name) for row in rows]
    frame = pd.DataFrame(table, dtype=object)
    for name in frame.columns:
        if name in COUNTS or name.startswith(("n.", "churn.")):
            frame[name] = frame[name].astype("Int64")
        elif name in TEXT and name not in NUMBERS:
            frame[name] = frame[name].astype("string")
        else:
            frame[name] = pd.to_numeric(frame[name]).astype("float64")
    return frame


def _column_order(name: str) -> tuple[int, str]:
    return _GROUPS.index(name.split(".", 1)[0]), name


def _row_order(row: Mapping[str, Any]) -> tuple[Any, ...]:
    family = FAMILIES.index(row["family"]) if row["family"] in FAMILIES else len(FAMILIES)
    place = (row["base"], row["target"], family, row["method"], row["variant"], row["rank"] or 0)
    return (*place, row["seed"], row["id"])
