"""Curve files: what a cell scores on the way from the untouched base to its end.

A trajectory follows training: the cell trained once more and scored at checkpoints (`trajectory`).
A rewind follows the finished update back: W0 + alpha (W - W0) (`rewind`). Both start at the base
and end at the cell's own record. Files: results/SUITE/curves/CELL.KIND.json, see
workflow/schemas/curve.schema.yaml. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import yaml

from ballast import tradeoff
from ballast.errors import BallastError, DataError
from ballast.files import read_sealed, write_sealed
from ballast.layout import Layout
from ballast.outcome import RECORD, cell_folder
from ballast.records import not_finite, one_line, read_path, status_of
from ballast.suite import CURVES

FORMAT = 1
KINDS = ("trajectory", "rewind")
SCORE = ("value", "n", "loss")
# Of a frame of curves, beside score.TASK; share: of the steps, or alpha.
CURVE_COLUMNS = ("cell", "kind", "share", "step", "alpha", "E", "F", "source_mean", "target_mean")

Curve = dict[str, Any]


def settings_of(spec: dict[str, Any], kind: str) -> dict[str, Any]:
    """What a cell's spec says about a kind of curve."""
    block = CURVES | spec.get("curves", {})
    return {key: block[key] for key in ("checkpoints" if kind == KINDS[0] else "alphas", "items")}


def points_of(settings: dict[str, Any]) -> int:
    """How many points of a curve have to be scored."""
    return settings.get("checkpoints") or len(settings["alphas"])


def why_left_out(spec: dict[str, Any], posthoc: bool, kind: str) -> str | None:
    """Why a cell cannot have a curve of this kind, or None."""
    if kind == "trajectory" and posthoc:
        return f"{spec['method']} is post-hoc: nothing is trained"
    if kind == "rewind" and not (posthoc or spec["merges"]):
        return f"{spec['method']} does not merge into plain weights"
    return None


def curve_cells(plan: pd.DataFrame, kind: str) -> tuple[list[str], dict[str, str]]:
    """Ids of a plan's cells that get a curve; and by method and variant why others cannot."""
    cells, left = [], {}
    for row in plan.to_dict("records"):
        spec = json.loads(row["spec"])
        methods = (CURVES | spec.get("curves", {}))["methods"]
        if methods != "all" and row["method"] not in methods:
            continue
        reason = why_left_out(spec, bool(row["posthoc"]), kind)
        if reason is None:
            cells.append(row["id"])
        else:
            left[row["method"]] = reason
    return cells, left


def finished_record(row: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The current record of a plan's row.

    Raises BallastError if the cell has not been run as planned; a failed one is a record.
    """
    path = cell_folder(row, layout) / RECORD
    record = read_path(path) if path.exists() else None
    status = status_of(row, record)
    if record is None or status not in ("ok", "failed"):
        raise BallastError(f"{row['id']} is {status}; run the suite first")
    return record


def new_curve(row: dict[str, Any], kind: str, record: dict[str, Any]) -> Curve:
    """A curve without points; `left_out` says why it will have none."""
    spec = json.loads(row["spec"])
    reason = why_left_out(spec, bool(row["posthoc"]), kind)
    if record["status"] == "failed":
        failure = record["failure"]
        reason = f"the cell failed: {failure['kind']}: {failure['reason']}"
    return {
        "format": FORMAT,
        "cell": row["id"],
        "kind": kind,
        "keys": {"train": row["train_key"], "eval": row["eval_key"]},
        "settings": settings_of(spec, kind),
        "left_out": reason,
        "identical": None,
        "points": [],
    }


def point(
    share: float, scores: Mapping[str, Any], step: int | None = None, alpha: float | None = None
) -> dict[str, Any]:
    """One point: share of the way (0 base, 1 end), step or alpha, and each task's score."""
    kept = {task: {key: score[key] for key in SCORE} for task, score in scores.items()}
    return {"share": share, "step": step, "alpha": alpha, "scores": kept}


def write_curve(curve: Curve, row: dict[str, Any], layout: Layout) -> Path:
    """Write a cell's curve where `read_curves` finds it; returns the path."""
    path = layout.curve(json.loads(row["spec"])["suite"], row["id"], curve["kind"])
    write_sealed(path, curve)
    return path


def is_current(row: dict[str, Any], layout: Layout, kind: str) -> bool:
    """Whether a cell's curve is there, made under the row's keys and settings."""
    spec = json.loads(row["spec"])
    path = layout.curve(spec["suite"], row["id"], kind)
    if not path.exists():
        return False
    try:
        curve = read_sealed(path)
    except DataError:
        return False
    keys = {"train": row["train_key"], "eval": row["eval_key"]}
    return curve["keys"] == keys and curve["settings"] == settings_of(spec, kind)


@cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = yaml.safe_load(Layout.here().schema("curve").read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(schema)


def _problem(curve: Any, name: str, records: Mapping[str, dict[str, Any]]) -> str | None:
    """Why a curve file cannot be used, or None."""
    worst = jsonschema.exceptions.best_match(_validator().iter_errors(curve))
    if worst is not None:
        where = ".".join(str(part) for part in worst.absolute_path) or "the curve"
        return f"{where}: {worst.message}"
    if bad := not_finite(curve, ""):
        return f"{bad}: not a finite number"
    if f"{curve['cell']}.{curve['kind']}.json" != name:
        return f"holds the curve of {curve['cell']}.{curve['kind']}"
    record = records.get(curve["cell"])
    if record is None:
        return "its cell has no record"
    if curve["keys"] != {key: record["keys"][key] for key in ("train", "eval")}:
        return "stale: its cell was trained or scored anew"
    if curve["points"] and record["status"] != "ok":
        return "its cell failed"
    tasks = set(record["tasks"])
    if any(set(found["scores"]) != tasks for found in curve["points"]):
        return "its tasks are not those of the cell"
    return None


def read_curves(
    folder: Path, records: Mapping[str, dict[str, Any]] | Iterable[dict[str, Any]]
) -> pd.DataFrame:
    """The curves of a suite's folder, one row per point (results.CURVE_COLUMNS and score.TASK).

    E and F are against the curve's own first point, which is the base on the same items. records:
    by id, or any of them. Curves that are damaged, stale or whose cell has no record are left out;
    `attrs["problems"]` names each in a line.
    """
    if not isinstance(records, Mapping):
        records = {record["id"]: record for record in records}
    rows: list[dict[str, Any]] = []
    problems = []
    for path in sorted((folder / "curves").glob("*.json")):
        try:
            curve = read_sealed(path)
        except DataError as error:
            problems.append(one_line(str(error)))
            continue
        problem = _problem(curve, path.name, records)
        if problem is None:
            rows += _rows(curve, records[curve["cell"]])
        else:
            problems.append(one_line(f"{path}: {problem}"))
    frame = _frame(rows)
    frame.attrs["problems"] = problems
    return frame


def _rows(curve: Curve, record: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for at in curve["points"]:
        scores = {"scores": at["scores"], "base_scores": curve["points"][0]["scores"]}
        measures = tradeoff.of_record({"tasks": record["tasks"], **scores})
        found.append(
            {"cell": curve["cell"], "kind": curve["kind"]}
            | {key: at[key] for key in ("share", "step", "alpha")}
            | {key: measures[key] for key in ("E", "F", "source_mean", "target_mean")}
            | {f"score.{task}": score["value"] for task, score in at["scores"].items()}
        )
    return found


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    scores = sorted({key for row in rows for key in row} - set(CURVE_COLUMNS))
    frame = pd.DataFrame(rows, columns=[*CURVE_COLUMNS, *scores])
    numbers = [name for name in frame.columns if name not in ("cell", "kind", "step")]
    kinds = {"cell": "string", "kind": "string", "step": "Int64"} | dict.fromkeys(numbers, float)
    return frame.astype(kinds).sort_values(["cell", "kind", "share"], ignore_index=True)
