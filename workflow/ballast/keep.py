"""A finished suite in two small files: its records, and the score of every item.

What a suite's results are read from later (tables, statistics over items) without its adapters and
curves. `results/kept/SUITE/` may be committed; everything else under results/ is made by runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from ballast.errors import DataError
from ballast.files import replacing, sha256_file
from ballast.records import scan, validate_record

RECORDS, ITEMS = "records.parquet", "items.parquet"


def keep_suite(suite: Path, folder: Path) -> int:
    """Write records.parquet and items.parquet of a suite's folder to `folder`.

    records.parquet: id, record (JSON); items.parquet: cell, task, item, score (0 to 1, float32),
    in the order of cells, tasks and items. Returns how many records were kept.
    Raises DataError if a record or a sample file is damaged, or none is there.
    """
    records, problems = scan(suite / "cells")
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
    parts = [
        _items(suite / "cells" / record["id"] / "samples" / f"{task}.parquet", record, task)
        for record in records
        if record["status"] == "ok"
        for task in record["tasks"]
    ]
    _write(table, folder / RECORDS)
    _write(pd.concat(parts, ignore_index=True), folder / ITEMS)
    return len(records)


def _items(path: Path, record: dict[str, Any], task: str) -> pd.DataFrame:
    if not path.is_file() or sha256_file(path) != record["files"][f"samples/{task}.parquet"]:
        raise DataError(f"{path}: missing, or not the file that the record describes")
    items = pd.read_parquet(path, columns=["item", "score"])
    return pd.DataFrame(
        {
            "cell": record["id"],
            "task": task,
            "item": items["item"].astype("int32"),
            "score": items["score"].astype("float32"),
        }
    )


def _write(table: pd.DataFrame, path: Path) -> None:
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")


def read_kept(folder: Path) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """The records of a kept suite, and its items. Raises DataError for a damaged record."""
    records = [json.loads(text) for text in pd.read_parquet(folder / RECORDS)["record"]]
    for record in records:
        validate_record(record)
    return records, pd.read_parquet(folder / ITEMS)
