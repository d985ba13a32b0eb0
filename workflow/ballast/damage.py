"""What is looked at before a run: records and what they stand on, set aside where it is damaged.

Snakemake makes a file again that is not there; a damaged one it would take for finished. Called
once, in the main process of a run; imports no torch. What is large (weights, adapters, features,
samples) is compared with its checksum where it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from ballast.errors import Damaged, DataError
from ballast.files import SUMS, read_seal, read_sealed, set_aside, sha256_small, wrong_files
from ballast.layout import Layout
from ballast.locks import held_if_free
from ballast.outcome import COMPLETE, MADE_OF_RECORDS, all_tasks
from ballast.records import NAME, one_line, status_of

# Files of a cell that tables and pages are made from, and that scoring the cell again makes anew.
READ = ("items.parquet", "changes.json")
BASE, MANIFEST = "base.json", "manifest.json"
# Of made files, which one Snakemake has to miss so that all of them are made again, and who holds
# the lock of that name is making them.
MADE = {f"{folder}/{SUMS}": f"{folder}/{COMPLETE}" for folder in MADE_OF_RECORDS}
MAKERS = {f"{folder}/{SUMS}": lock for folder, lock in MADE_OF_RECORDS.items()}


def set_aside_damaged(
    plan: pd.DataFrame, tune: pd.DataFrame, layout: Layout, suite: str
) -> list[str]:
    """Rename what is damaged of a suite's results to `*.damaged`; returns a line for each file.

    Records of the suite's cells and of `tune`, the items and changed answers beside them, curves,
    ready bases with what cells that are due will need of them, and made tables and pages.
    """
    home = layout.suite(suite)
    lines: list[str] = []
    for table, folder in ((plan, home / "cells"), (tune, home / "tune" / "cells")):
        due = set()
        for row in table[["id", "base", "base_key", "train_key", "eval_key"]].to_dict("records"):
            record = _record(folder / row["id"], lines)
            if status_of(row, record) not in ("ok", "failed"):
                due.add(row["base"])
        for base in sorted(set(table["base"])):
            _base(home / "bases" / f"{base}.json", base in due, layout, lines)
    for path in sorted((home / "curves").glob("*.json")):
        _sealed(path, "its target makes it again", lines)
    for sums, needed in MADE.items():
        with held_if_free(home, MAKERS[sums]) as free:
            if free:
                _made(home, sums, needed, lines)
    return [one_line(line) for line in lines]


def _record(folder: Path, lines: list[str]) -> dict[str, Any] | None:
    """The record of a cell's folder if it is whole, with the files that tables need beside it."""
    path = folder / NAME
    if not path.exists():
        return None
    try:
        record, _ = read_seal(path)
        if record.get("id") != folder.name:
            raise Damaged(f"{path}: holds the record of another cell, {record.get('id')}")
        for name in READ:
            expected = record.get("files", {}).get(name)
            if expected is not None and _digest(folder / name) != expected:
                set_aside(folder / name)
                raise Damaged(f"{folder / name}: missing, or damaged")
        # Whatever else is wrong with a record without a checksum is told with the tables.
        known = {"train", "eval"} <= set(record.get("keys", {})) and "status" in record
        return record if known else None
    except Damaged as error:
        set_aside(path)
        lines.append(f"{error}; set aside as *.damaged, the cell is finished again")
    except DataError as error:
        lines.append(str(error))
    return None


def _digest(path: Path) -> str | None:
    try:
        return sha256_small(path)
    except FileNotFoundError:
        return None


def _base(path: Path, due: bool, layout: Layout, lines: list[str]) -> None:
    """Set a ready base aside if its file is damaged or, for cells that are due, what it names."""
    if not path.exists():
        return
    try:
        ready = read_sealed(path)
        if ready.get("base") != path.stem:
            raise Damaged(f"{path}: holds another base, {ready.get('base')}")
        if due:
            for problem in _gone(ready, layout.base(ready["base"], ready["base_key"])):
                raise Damaged(problem)
    except Damaged as error:
        set_aside(path)
        lines.append(f"{error}; the base {path.stem} is made ready again")
    except DataError as error:
        lines.append(str(error))


def _gone(ready: dict[str, Any], home: Path) -> Iterator[str]:
    """What a ready base names and is not there: looked for by name, not by content."""
    made = read_sealed(home / BASE)
    if "path" not in made["source"]:
        model = Path(ready["model"])
        yield from (f"{p}: missing" for p in (model / n for n in made["files"]) if not p.is_file())
    for task in all_tasks(ready):
        folder = Path(task["folder"])
        manifest = read_sealed(folder / MANIFEST)
        for name in manifest.get("files", {}):
            if not (folder / name).is_file():
                yield f"{folder / name}: missing"
        if not Path(task["items"]).is_file():
            yield f"{task['items']}: missing"


def _sealed(path: Path, then: str, lines: list[str]) -> None:
    try:
        read_sealed(path)
    except Damaged as error:
        set_aside(path)
        lines.append(f"{error}; set aside as *.damaged, {then}")
    except DataError as error:
        lines.append(str(error))


def _made(home: Path, sums: str, needed: str, lines: list[str]) -> None:
    """Set tables or pages aside that are not as they were written, so that they are made again."""
    if not (home / sums).is_file():
        return
    try:
        wrong = wrong_files(home, read_sealed(home / sums)["files"])
    except Damaged as error:
        wrong = {sums: str(error).removeprefix(f"{home / sums}: ")}
    except DataError as error:
        lines.append(str(error))
        return
    for name, problem in wrong.items():
        lines.append(f"{home / name}: {problem}; made again")
        set_aside(home / name)
    if wrong:
        (home / needed).unlink(missing_ok=True)
