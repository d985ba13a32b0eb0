"""How a cell ends: its record before any result, the record of a failure, and the exit codes.

Imports no torch: the supervisor writes the record of a child that could not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ballast import versions
from ballast.errors import DataError
from ballast.files import read_sealed, write_sealed
from ballast.layout import Layout
from ballast.records import read_path, validate_record
from ballast.tasks import Task, read_tasks

RECORD, ADAPTER = "run.json", "adapter.safetensors"
# Stands in the folders that are made from a suite's records while they show every record.
COMPLETE = ".complete"
# Folders that are made of records, and the lock that their maker holds in the suite's folder.
MADE_OF_RECORDS = {"tables": ".tables.lock", "leaderboard": ".site.lock"}
# Of a ready base: its tasks by precision, for cells in lower ones than fp32.
LOWER = "lower_precisions"
# Exit codes by which a cell's process tells its supervisor what happened. BROKEN: data or a base is
# not what it should be, or the machine failed (`faults`); neither is a result of the cell.
RECORDED, BROKEN, OUT_OF_MEMORY = 0, 3, 77


def blank_record(
    row: dict[str, Any], ready: dict[str, Any], tasks: dict[str, Task]
) -> dict[str, Any]:
    """A record of a plan's row without results, in the order in which it is read.

    ready: the base as `ready.make_ready` left it (its own scores and data).
    """
    spec = json.loads(row["spec"])
    rank = spec["rank"]
    return {
        "format": versions.RECORD,
        "id": row["id"],
        "status": "failed",
        "failure": None,
        "identity": {key: spec[key] for key in ("suite", "base", "target", "method", "variant")}
        | {"rank": rank, "seed": spec["seed"], "parents": spec["parents"]},
        "method": {
            "title": spec["title"],
            "family": spec["family"],
            "digest": spec["method_digest"],
        },
        "keys": {
            "train": row["train_key"],
            "eval": row["eval_key"],
            "base": row["base_key"],
            "data": row["data_key"],
        },
        "settings": {
            "learning_rate": spec.get("learning_rate"),
            "learning_rate_source": spec.get("learning_rate_source"),
            "hyper": spec["hyper"],
            "training": None if row["posthoc"] else spec["training"],
            "modules": spec["modules"],
            "connector": spec["connector"],
            "scale": None,
            "evaluation": spec["evaluation"],
        },
        "tasks": {name: _task(tasks[name], entry) for name, entry in spec["tasks"].items()},
        "scored": None,
        "scores": {},
        "base_scores": {name: _base_score(spec, ready, name) for name in spec["tasks"]},
        "costs": {
            "trainable_parameters": None,
            "total_parameters": None,
            "adapter_bytes": None,
            "seconds": {},
            "first_step_seconds": None,
            "step_ms": None,
            "memory_mb": {},
            "tokens": None,
        },
        "report": {},
        "curve": None,
        "churn": {},
        "drift": {},
        "files": {},
        "provenance": {
            "base": {"source": spec["source"]}
            | {key: ready[key] for key in ("commit", "files") if key in ready},
            "data": {name: ready["tasks"][name]["manifest"] for name in spec["tasks"]},
            "versions": {"train": versions.TRAIN, "evaluation": versions.EVALUATION},
        },
    }


def split_of(spec: dict[str, Any], task: str) -> str:
    """The split that a cell is scored on: test, but for the targets of `tune`."""
    return spec["tasks"][task].get("split", spec.get("split", "test"))


def _base_score(spec: dict[str, Any], ready: dict[str, Any], task: str) -> dict[str, Any]:
    """The untouched base's score on the split of a cell's task."""
    key = "validation_scores" if split_of(spec, task) == "validation" else "scores"
    found = ready["tasks"][task].get(key)
    if found is None:
        raise DataError(f"base {ready['base']}: no {key} of {task}; remove its file, run again")
    return found


def adapters_of(spec: dict[str, Any], layout: Layout) -> dict[str, str | None]:
    """Digest of the adapter of each of a cell's parents, by the parent's id; None if it failed.

    Raises DataError for a parent's record that is missing or damaged.
    """
    folders = {name: layout.cell(spec["suite"], name) for name in spec["parents"]}
    records = {name: read_path(folder / RECORD) for name, folder in folders.items()}
    return {name: record["files"].get(ADAPTER) for name, record in records.items()}


def failed_record(
    row: dict[str, Any], layout: Layout, kind: str, reason: str, attempts: int
) -> dict[str, Any]:
    """The record of a cell that did not finish: its kind of failure and one line of reason."""
    record = blank_record(row, ready_base(row, layout), read_tasks(layout.tasks))
    line = " ".join(reason.split())[:500]
    record |= {"status": "failed"}
    record["failure"] = {"kind": kind, "reason": line, "attempts": attempts}
    return record


def write_record(row: dict[str, Any], layout: Layout, record: dict[str, Any]) -> None:
    """Check a cell's record and write it; what was made of the records before is complete no more.

    Dates alone would not tell: a clock that was set back makes a new record look old.
    Raises DataError for a record that no table could read: it must not count as done.
    """
    validate_record(record)
    spec = json.loads(row["spec"])
    for folder in () if "folder" in spec else MADE_OF_RECORDS:
        (layout.suite(spec["suite"]) / folder / COMPLETE).unlink(missing_ok=True)
    write_sealed(cell_folder(row, layout) / RECORD, record)


def cell_folder(row: dict[str, Any], layout: Layout) -> Path:
    """Where a cell of a plan (or of the plan of `tune`) keeps its files."""
    spec = json.loads(row["spec"])
    return layout.cell(spec.get("folder", spec["suite"]), row["id"])


def ready_base(row: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The base of a cell as `ready.make_ready` left it, `tasks` being those of its own precision.

    Raises DataError if it is another one.
    """
    spec = json.loads(row["spec"])
    suite = spec["suite"]
    ready = read_sealed(layout.suite(suite) / "bases" / f"{row['base']}.json")
    if ready["base_key"] != row["base_key"]:
        raise DataError(f"base {row['base']} changed under the cell: plan and base disagree")
    own = tasks_in(ready, spec["training"]["precision"])
    for name, entry in spec["tasks"].items():
        wanted = layout.data(row["base"], row["base_key"], name, entry["data_key"])
        found = own.get(name)
        if found is None or Path(found["folder"]).parts[-2:] != wanted.parts[-2:]:
            raise DataError(
                f"base {row['base']}: was not made ready with {name} as the plan wants it; remove "
                f"{layout.suite(suite) / 'bases' / row['base']}.json and run again"
            )
    # A post-hoc cell asks for the training data of parents, whose precision may be another one.
    others = {
        name: t for precision in ready.get(LOWER, {}).values() for name, t in precision.items()
    }
    return ready | {"tasks": ready["tasks"] | others | own}


def tasks_in(ready: dict[str, Any], precision: str) -> dict[str, dict[str, Any]]:
    """A ready base's tasks for cells of a precision: their data, and its own scores in it."""
    return ready["tasks"] if precision == "fp32" else ready.get(LOWER, {}).get(precision, {})


def all_tasks(ready: dict[str, Any]) -> list[dict[str, Any]]:
    """A ready base's tasks for cells of every precision that it has cells in."""
    blocks = [ready["tasks"], *ready.get(LOWER, {}).values()]
    return [task for block in blocks for task in block.values()]


def _task(task: Task, entry: dict[str, Any]) -> dict[str, Any]:
    metadata = task.metadata
    return {
        "title": metadata["title"],
        "role": entry["role"],
        "metric": task.metric,
        "unit": task.unit,
        "direction": metadata["direction"],
        "chance": task.chance,
    }
