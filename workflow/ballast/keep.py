"""A finished suite in a few small files: its records, every item, some changed answers, its curves.

What a suite's results are read from later (tables, statistics over items, pages) without its
adapters. `results/kept/SUITE/` may be committed; everything else under results/ is made by runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ballast import items
from ballast.errors import DataError
from ballast.files import (
    check_sums,
    forget_sums,
    read_json,
    remove_parts,
    replacing,
    sha256_file,
    write_sums,
    write_text,
)
from ballast.rates import TABLE
from ballast.records import scan, validate_record

RECORDS, ITEMS = "records.parquet", "items.parquet"
CHANGES, CURVES = "changes.parquet", "curves.parquet"
# As cells store them, but for the losses: 11 bits of precision are enough for what is committed.
SCHEMA = pa.schema(
    [
        pa.field("cell", items.NAMES),
        *(f.with_type(pa.float16()) if f.name.endswith("loss") else f for f in items.SCHEMA),
    ]
)
# Changed answers of every list that are kept: as many as fit into so many bytes.
ENTRIES, MOST_BYTES = (10, 5, 3, 2, 1, 0), 3 << 18


def keep_suite(suite: Path, folder: Path, rates: Path | None = None) -> int:
    """Write what is known of a suite's cells to `folder`; returns how many records were kept.

    records.parquet: id, record (JSON). items.parquet: cell and the columns of `items.SCHEMA`, in
    the order of cells, tasks and items; of cells scored before these were stored, item, score and
    loss alone. changes.parquet: cell, task, kind (gained or forgotten) and entry (JSON), the first
    ones of each list. curves.parquet: the suite's curves, if it has any. learning_rates.csv: of
    `tune`, or else `rates`.
    Raises DataError if a record or one of these files is damaged, or none is there.
    """
    cells = suite / "cells"
    records, problems = scan(cells)
    if problems:
        raise DataError(problems[0])
    if not records:
        raise DataError(f"{suite}: no records to keep; run the suite first")
    table = pd.DataFrame(
        {
            "id": [record["id"] for record in records],
            "record": [json.dumps(record, ensure_ascii=False) for record in records],
        }
    )
    finished = [record for record in records if record["status"] == "ok"]
    remove_parts(folder)
    forget_sums(folder)
    with replacing(folder / ITEMS) as temporary:
        items.write_table(items.as_table(_items(cells, finished), SCHEMA), temporary)
    _write(table, folder / RECORDS)
    _write(_changes(cells, finished), folder / CHANGES)
    _write(_curves(suite, records), folder / CURVES)
    for path in (suite / "tune" / TABLE, rates):
        if path and path.is_file():
            write_text(folder / TABLE, path.read_text(encoding="utf-8"))
            break
    names = (RECORDS, ITEMS, CHANGES, CURVES, TABLE)
    write_sums(folder, [folder / name for name in names if (folder / name).is_file()])
    return len(records)


def _items(cells: Path, records: list[dict[str, Any]]) -> pd.DataFrame:
    found = items.items_of(cells, records)
    if found.attrs["problems"]:
        raise DataError(found.attrs["problems"][0])
    parts = [
        _samples(cells / record["id"] / "samples" / f"{task}.parquet", record, task)
        for record in records
        if items.ITEMS not in record["files"]
        for task in record["tasks"]
    ]
    if parts:
        whole = pd.concat([found.astype({"cell": str, "task": str, "subject": str}), *parts])
        found = whole.sort_values("cell", kind="stable", ignore_index=True)
    for name in ("loss", "base_loss"):
        found[name] = np.minimum(found[name], np.finfo(np.float16).max)
    return found


def _samples(path: Path, record: dict[str, Any], task: str) -> pd.DataFrame:
    """A task's items from its samples: what is known where a cell stored no items."""
    if not path.is_file() or sha256_file(path) != record["files"][f"samples/{task}.parquet"]:
        raise DataError(f"{path}: missing, or not the file that the record describes")
    known = pd.read_parquet(path, columns=["item", "score", "loss"])
    return known.assign(cell=record["id"], task=task).reindex(columns=SCHEMA.names)


def _changes(cells: Path, records: list[dict[str, Any]]) -> pd.DataFrame | None:
    """As many of the cells' changed answers as fit; None if no cell has any."""
    rows = [
        (record["id"], task, kind, place, json.dumps(entry, ensure_ascii=False))
        for record in records
        if items.CHANGES in record["files"]
        for task, kind, place, entry in _entries(cells / record["id"] / items.CHANGES, record)
    ]
    table = pd.DataFrame(rows, columns=["cell", "task", "kind", "place", "entry"])
    for most in ENTRIES:
        part = table[table["place"] < most].drop(columns="place")
        content = BytesIO()
        part.to_parquet(content, index=False, compression="zstd")
        if content.tell() <= MOST_BYTES:
            break
    return part if len(part) else None


def _entries(path: Path, record: dict[str, Any]) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    if not path.is_file() or sha256_file(path) != record["files"][items.CHANGES]:
        raise DataError(f"{path}: missing, or not the file that the record describes")
    for task, kinds in read_json(path).items():
        for kind, entries in kinds.items():
            for place, entry in enumerate(entries):
                yield task, kind, place, entry


def _curves(suite: Path, records: list[dict[str, Any]]) -> pd.DataFrame | None:
    if not (suite / "curves").is_dir():
        return None
    from ballast.curves import read_curves

    curves = read_curves(suite, records)
    problems = curves.attrs.pop("problems", [])
    if problems:
        raise DataError(problems[0])
    return curves if len(curves) else None


def _write(table: pd.DataFrame | None, path: Path) -> None:
    """Write a table; without one, a file of an earlier time goes."""
    if table is None:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")


def read_kept(folder: Path) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """The records of a kept suite, and its items as `items.items_of` gives them.

    A suite kept by an earlier version has cell, task, item and score alone.
    Raises DataError for a damaged file or record.
    """
    check_sums(folder)
    records = [json.loads(text) for text in pd.read_parquet(folder / RECORDS)["record"]]
    for record in records:
        validate_record(record)
    found = pd.read_parquet(folder / ITEMS)
    kinds = dict.fromkeys(("cell", "task", "subject"), "category")
    kinds |= dict.fromkeys(("score", "base_score", "loss", "base_loss"), "float32")
    return records, found.astype({name: kind for name, kind in kinds.items() if name in found})


def read_kept_changes(folder: Path) -> pd.DataFrame:
    """Changed answers of a kept suite: cell, task, kind (gained or forgotten), entry (a dict)."""
    path = folder / CHANGES
    if not path.is_file():
        return pd.DataFrame(columns=["cell", "task", "kind", "entry"])
    found = pd.read_parquet(path)
    return found.assign(entry=[json.loads(text) for text in found["entry"]])


def read_kept_curves(folder: Path) -> pd.DataFrame | None:
    """The curves of a kept suite (`results.CURVE_COLUMNS` and score.TASK), or None."""
    path = folder / CURVES
    return pd.read_parquet(path) if path.is_file() else None
