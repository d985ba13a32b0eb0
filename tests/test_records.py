"""The format of run.json, and whether a record is current."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ballast import records
from ballast.errors import DataError
from ballast.files import write_json
from fake_records import failed, record


def put(folder: Path, found: dict[str, Any]) -> Path:
    path = folder / found["id"] / records.NAME
    write_json(path, found)
    return path


def test_good_records_pass() -> None:
    records.validate_record(record())
    records.validate_record(record(rank=None))
    bare = failed(record()) | {"scored": None, "scores": {}, "base_scores": {}, "curve": None}
    bare |= {"costs": {}, "tasks": {}, "report": {}}
    records.validate_record(bare)


BROKEN = {
    "no seed": (("identity", "seed"), None),
    "unknown status": (("status",), "done"),
    "ok with a failure": (("failure",), {"kind": "oom", "reason": "x", "attempts": 1}),
    "newer format": (("format",), 2),
    "text for a number": (("scores", "facts", "value"), "90"),
    "above 100 points": (("scores", "facts", "value"), 100.5),
    "below 0 points": (("base_scores", "codes", "value"), -1),
    "NaN": (("scores", "tales", "value"), float("nan")),
    "infinite": (("costs", "step_ms"), float("inf")),
    "no items": (("scores", "facts", "n"), 0),
    "points, lower is better": (("tasks", "facts", "direction"), "lower"),
    "unknown unit": (("tasks", "facts", "unit"), "cider"),
    "negative seconds": (("costs", "seconds", "train"), -1.0),
    "reason on two lines": (("failure",), {"kind": "oom", "reason": "a\nb", "attempts": 1}),
    "extra key": (("surprise",), 1),
    "a folder for an id": (("id",), "../../x"),
    "unknown family": (("method", "family"), "magic"),
    "scores are missing": (("scores",), {}),
    "base's scores are missing": (("base_scores",), {}),
    "costs are missing": (("costs",), {}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_records_are_refused_in_one_line(name: str) -> None:
    (*path, last), value = BROKEN[name]
    found = record()
    place = found
    for key in path:
        place = place[key]
    place[last] = value
    with pytest.raises(DataError) as error:
        records.validate_record(found)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 300


@pytest.mark.parametrize("value", [None, [], "text", 3, {}])
def test_other_things_are_not_records(value: object) -> None:
    with pytest.raises(DataError):
        records.validate_record(value)


def test_a_score_of_an_undeclared_task_is_refused() -> None:
    found = record()
    found["scores"]["other"] = {"value": 1.0, "n": 3, "loss": None}
    with pytest.raises(DataError, match="other"):
        records.validate_record(found)


def test_scan(tmp_path: Path) -> None:
    good = [record(seed=seed) for seed in (2, 0, 1)]
    for found in good:
        put(tmp_path, found)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / records.NAME).touch()
    cut = put(tmp_path, record("dora"))
    cut.write_bytes(cut.read_bytes()[:500])
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / records.NAME).write_bytes(b"\xff\xfe\x00")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / records.NAME).write_text("[" * 100_000)
    (tmp_path / "folder" / records.NAME).mkdir(parents=True)
    write_json(tmp_path / "moved" / records.NAME, record("pissa"))
    found, problems = records.scan(tmp_path)
    assert [item["id"] for item in found] == sorted(item["id"] for item in good)
    assert len(problems) == 6
    assert all("\n" not in line and str(tmp_path) in line for line in problems)
    assert records.scan(tmp_path / "nowhere") == ([], [])


def test_nan_in_a_file_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, record())
    path.write_text(json.dumps(record() | {"report": {"density": float("nan")}}))
    with pytest.raises(DataError, match=r"report\.density: not a finite number"):
        records.read_path(path)


def test_status() -> None:
    row = {"train_key": "t1", "eval_key": "e1"}
    other_train, other_eval = row | {"train_key": "t2"}, row | {"eval_key": "e2"}
    bad = failed(record())
    assert records.status_of(row, None) == "missing"
    assert records.status_of(row, record()) == "ok"
    assert records.status_of(row, bad) == "failed"
    assert records.status_of(other_eval, record()) == "rescore"
    assert records.status_of(other_train | {"eval_key": "e2"}, record()) == "stale"
    assert records.status_of(other_train, bad) == "stale"
    assert records.status_of(other_eval, bad) == "failed"
