"""The items of a cell beside those of the untouched base: made, stored, and read for many cells."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ballast.errors import DataError
from ballast.files import replacing, sha256_file

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
_OWN = ["item", "subject", "score", "loss", "form"]


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
        pq.write_table(_as_table(items, SCHEMA), temporary, compression="zstd")


def _as_table(items: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    plain = pa.schema(
        [(f.name, pa.string() if pa.types.is_dictionary(f.type) else f.type) for f in schema]
    )
    table = pa.Table.from_pandas(items, schema=plain, preserve_index=False, safe=False)
    return table.replace_schema_metadata().cast(schema)


def items_of(
    cells: Path,
    records: Iterable[dict[str, Any]],
    tasks: Iterable[str] | None = None,
    check: bool = False,
) -> tuple[pd.DataFrame, list[str]]:
    """The stored items of many cells as one frame, and a line for each file that is damaged.

    cells: the folder of the cells' folders; tasks: only these; check: compare the files with the
    hashes in their records. Returns columns `cell` and those of SCHEMA (cell, task and subject as
    categories), in the order of records, tasks and items. Records without items (failed ones, and
    those scored before items were stored) have none.
    """
    chosen = [record for record in records if ITEMS in record["files"]]
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(partial(_read, cells, tasks and set(tasks), check), chosen))
    tables = [table for table in read if isinstance(table, pa.Table)]
    problems = [found for found in read if isinstance(found, str)]
    schema = pa.schema([pa.field("cell", NAMES), *SCHEMA])
    whole = pa.concat_tables([schema.empty_table(), *tables]).unify_dictionaries()
    return whole.to_pandas(self_destruct=True, split_blocks=True), problems


def _read(
    cells: Path, tasks: set[str] | None, check: bool, record: dict[str, Any]
) -> pa.Table | str:
    path = cells / record["id"] / ITEMS
    try:
        if check and sha256_file(path) != record["files"][ITEMS]:
            return f"{path}: not the file that the record describes"
        # Opened as a stream: pyarrow would look at the whole folder of a path.
        with path.open("rb") as stream:
            table = pq.ParquetFile(stream).read(use_threads=False)
        table = table.select(SCHEMA.names).cast(SCHEMA)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror or error}"
    except (pa.ArrowException, KeyError, ValueError) as error:
        return f"{path}: damaged: {' '.join(str(error).split())[:200]}"
    if tasks is not None:
        known = table["task"].combine_chunks().dictionary if len(table) else []
        kept = pa.array([name.as_py() in tasks for name in known])
        table = table.filter(kept.take(table["task"].combine_chunks().indices))
    name = pa.DictionaryArray.from_arrays(
        pa.repeat(pa.scalar(0, pa.int32()), len(table)), pa.array([record["id"]])
    )
    return table.add_column(0, pa.field("cell", NAMES), name)
