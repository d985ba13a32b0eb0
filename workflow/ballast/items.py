"""The items of a cell beside those of the untouched base: made, stored, and read for many cells."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ballast.errors import DataError
from ballast.files import replacing

ITEMS, CHANGES = "items.parquet", "changes.json"
NAMES = pa.dictionary(pa.int32(), pa.string())
# What a cell stores; frames of many cells have `cell` in front.
SCHEMA = pa.schema(
    {
        "task": NAMES,
        "item": pa.int32(),
        "subject": NAMES,
        "score": pa.float32(),
        "loss": pa.float32(),
        "form": pa.int8(),
        "base_score": pa.float32(),
        "base_loss": pa.float32(),
        "base_form": pa.int8(),
    }
)
_CELL = pa.field("cell", NAMES)
COLUMNS = ("cell", *SCHEMA.names)
_OWN = ["item", "subject", "score", "loss", "form"]
# Losses and item numbers hardly repeat: a dictionary of them would cost time and space.
_REPEATED = ["task", "subject", "score", "form", "base_score", "base_form"]


def beside_base(task: str, own: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """A task's items with the base's score, loss and form of the same items.

    own, base: items as `evaluation.Scores` has them. Raises DataError if they are not the same.
    """
    if not own["item"].equals(base["item"]) or "form" not in base:
        raise DataError(
            f"{task}: the untouched base was scored on other items or by an earlier version; "
            "remove the suite's bases/*.json and run again"
        )
    joined = own[_OWN].reset_index(drop=True)
    for name in ("score", "loss", "form"):
        joined[f"base_{name}"] = base[name].to_numpy()
    joined.insert(0, "task", task)
    return joined


def write_items(items: pd.DataFrame, path: Path) -> None:
    """Store a cell's items, in the order given."""
    with replacing(path) as temporary:
        write_table(as_table(items, SCHEMA), temporary)


def write_table(table: pa.Table, path: Path) -> None:
    """Write a table of items compactly, for fast reading of many."""
    pq.write_table(
        table,
        path,
        compression="zstd",
        write_statistics=False,
        use_dictionary=[name for name in table.column_names if name in ("cell", *_REPEATED)],
    )


def as_table(items: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    """A frame of items as an Arrow table of this schema, without pandas' own notes."""
    return pa.Table.from_arrays([_array(items[f.name], f.type) for f in schema], schema=schema)


def _array(values: pd.Series, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        # Categories that no row has are dropped: they would be stored with every part.
        named = values.astype("category").cat.remove_unused_categories()
        codes = pa.array(named.cat.codes, pa.int32(), mask=(named.cat.codes < 0).to_numpy())
        texts = pa.array(named.cat.categories.astype(object), pa.string())
        return pa.DictionaryArray.from_arrays(codes, texts)
    if pa.types.is_floating(kind):
        return pa.array(values.to_numpy(dtype=kind.to_pandas_dtype()))
    return pa.array(values, from_pandas=True).cast(kind)


def items_of(
    cells: Path,
    records: Iterable[dict[str, Any]],
    tasks: Iterable[str] | None = None,
) -> pd.DataFrame:
    """The stored items of many cells as one frame.

    cells: the folder of the cells' folders; tasks: only these. Returns columns `cell` and those of
    SCHEMA (cell, task and subject as categories), in the order of records, tasks and items. Records
    without items (failed ones, and those scored before items were stored) have none;
    `attrs["problems"]` has a line for each file that is missing, damaged, or not the one whose hash
    is in its record.
    """
    chosen = [record for record in records if ITEMS in record["files"]]
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(partial(_read, cells, tasks and set(tasks)), chosen))
    tables = [table for table in read if isinstance(table, pa.Table)]
    problems = [found for found in read if isinstance(found, str)]
    schema = pa.schema([_CELL, *SCHEMA])
    whole = pa.concat_tables([schema.empty_table(), *tables]).unify_dictionaries()
    frame = whole.to_pandas(self_destruct=True, split_blocks=True)
    frame.attrs["problems"] = problems
    return frame


def _read(cells: Path, tasks: set[str] | None, record: dict[str, Any]) -> pa.Table | str:
    path = cells / record["id"] / ITEMS
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != record["files"][ITEMS]:
            return f"{path}: not the file that the record describes"
        table = pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False)
        if table.schema != SCHEMA:
            table = table.select(SCHEMA.names).cast(SCHEMA)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror or error}"
    except (pa.ArrowException, KeyError, ValueError) as error:
        return f"{path}: damaged: {' '.join(str(error).split())[:200]}"
    if tasks is not None and len(table):
        names = table["task"].combine_chunks()
        kept = pa.array([name in tasks for name in names.dictionary.to_pylist()])
        table = table.filter(kept.take(names.indices))
    cell = pa.DictionaryArray.from_arrays(
        np.zeros(len(table), dtype=np.int32), pa.array([record["id"]])
    )
    return table.add_column(0, _CELL, cell)
