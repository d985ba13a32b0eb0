"""The record of a cell, `run.json`: its format, how it is read, and whether it is still current.

A record that cannot be trusted is refused as a whole with one line that says why: tables never show
half of a record.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from ballast import escape, versions
from ballast.errors import Damaged, DataError
from ballast.files import read_seal, sha256_small
from ballast.layout import Layout

NAME = "run.json"
STATUSES = ("ok", "failed", "stale", "rescore", "missing")


@cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = yaml.safe_load(Layout.here().schema("record").read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(schema)


def one_line(text: str, longest: int = 300) -> str:
    """The text on one line without control characters, cut if long."""
    return escape.shorten(escape.one_line(text), longest)


def validate_record(record: Any) -> None:
    """Raise DataError with one line that names the field, if the record breaks its format.

    The schema says what may stand where. Beyond it: every number is finite, points lie in 0 to 100,
    a unit of points means that higher is better, and an ok record has every task's score for the
    tuned model and for the base.
    """
    worst = jsonschema.exceptions.best_match(_validator().iter_errors(record))
    if worst is not None:
        where = ".".join(str(part) for part in worst.absolute_path) or "the record"
        raise DataError(one_line(f"{where}: {worst.message}"))
    bad = not_finite(record, "")
    if bad:
        raise DataError(one_line(f"{bad}: not a finite number"))
    for name, task in record["tasks"].items():
        if task["unit"] == "points" and task["direction"] != "higher":
            raise DataError(one_line(f"tasks.{name}: points are higher-is-better"))
        for block in ("scores", "base_scores"):
            _check_score(record, block, name, task)
    for block in ("scores", "base_scores"):
        for name in record[block]:
            if name not in record["tasks"]:
                raise DataError(one_line(f"{block}.{name}: not among the record's tasks"))


def _check_score(record: dict[str, Any], block: str, name: str, task: dict[str, Any]) -> None:
    score = record[block].get(name)
    if score is None:
        if record["status"] == "ok":
            raise DataError(one_line(f"{block}.{name}: missing in a record that is ok"))
        return
    if task["unit"] == "points" and not -1e-9 <= score["value"] <= 100 + 1e-9:
        raise DataError(
            one_line(f"{block}.{name}.value: {score['value']} is not in 0 to 100 points")
        )


def not_finite(value: Any, where: str) -> str:
    """Path of the first number that is NaN or infinite, or an empty text."""
    if isinstance(value, float):
        return "" if math.isfinite(value) else where
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    return next((bad for k, v in items if (bad := not_finite(v, f"{where}.{k}".strip(".")))), "")


def read_path(path: Path) -> dict[str, Any]:
    """Read and check one record. Raises DataError with one line for a damaged or missing file."""
    try:
        record, sealed = read_seal(path)
    except DataError as error:
        raise DataError(one_line(str(error))) from None
    # A sealed record was checked when it was written; thousands are read at once.
    if sealed and record.get("format") == versions.RECORD:
        return record
    try:
        validate_record(record)
    except DataError as error:
        raise DataError(one_line(f"{path}: {error}")) from None
    return record


def beside(folder: Path, record: dict[str, Any], name: str) -> Path | None:
    """The file `name` beside a record in a cell's folder; None if the cell has none.

    Raises Damaged if the record names it, and it is missing or another one. Records of earlier
    versions do not name all of their files.
    """
    path, expected = folder / name, record["files"].get(name)
    if expected is None:
        return path if path.is_file() else None
    try:
        if sha256_small(path) == expected:
            return path
    except FileNotFoundError:
        raise Damaged(one_line(f"{path}: missing")) from None
    except OSError as error:
        raise DataError(one_line(f"{path}: cannot be read: {error.strerror or error}")) from None
    raise Damaged(one_line(f"{path}: damaged: not the file that the record describes"))


def scan(cells_folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every record under `cells_folder` (a folder per cell, named by its id), and the problems.

    Returns the readable records sorted by id, and one line for each record that is damaged or that
    lies in another cell's folder. A folder without a record (an unfinished cell) is neither.
    """
    records, problems = [], []
    for path in sorted(cells_folder.glob(f"*/{NAME}")):
        try:
            record = read_path(path)
        except DataError as error:
            problems.append(str(error))
            continue
        if record["id"] != path.parent.name:
            problems.append(one_line(f"{path}: holds the record of another cell, {record['id']}"))
            continue
        records.append(record)
    return sorted(records, key=lambda record: record["id"]), problems


def status_of(row_of_plan: Any, record: dict[str, Any] | None) -> str:
    """Where a planned cell stands, one of `STATUSES`.

    row_of_plan: anything with the keys train_key and eval_key (a row of the plan).
    missing: no record. stale: trained under other settings, data, code or base; wins over the rest.
    failed: the current settings failed (whatever was evaluated). rescore: trained as planned, but
    the scores come from other task definitions or evaluation code.
    """
    if record is None:
        return "missing"
    if record["keys"]["train"] != row_of_plan["train_key"]:
        return "stale"
    if record["status"] == "failed":
        return "failed"
    return "ok" if record["keys"]["eval"] == row_of_plan["eval_key"] else "rescore"
