"""The tables of a bundle, read within limits: a small parquet file may stand for a large table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from ballast.community.bundle_checks import LIMITS
from ballast.errors import DataError
from ballast.escape import one_line, shorten
from ballast.items import COLUMNS as ITEM_COLUMNS

CHANGE_COLUMNS = ("cell", "task", "kind", "entry")
BATCH = 64


def _open(path: Path, texts: Sequence[str], columns: Sequence[str], most: int) -> pq.ParquetFile:
    """A parquet file whose columns, rows and claimed size are within what is allowed.

    texts: columns that stay dictionaries, so that repeated text takes no memory.
    """
    meta = pq.read_metadata(path)
    names = meta.schema.names
    if len(set(names)) < len(names) or not set(names) <= set(columns):
        extra = sorted(set(names) - set(columns)) or names
        shown = shorten(one_line(extra[0]), 100)
        raise DataError(f"{path.name}: column {shown!r} is not expected")
    if meta.num_rows > most:
        raise DataError(f"{path.name}: {meta.num_rows:,} rows; at most {most:,}")
    size = sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))
    if size > LIMITS.unpacked:
        raise DataError(f"{path.name}: {size:,} bytes unpacked; at most {LIMITS.unpacked:,}")
    return pq.ParquetFile(path, read_dictionary=[name for name in texts if name in names])


def _texts(
    path: Path, columns: Sequence[str], most: int, longest: int
) -> Iterator[tuple[str, ...]]:
    """The rows of a table of texts, few at a time, until they are too long."""
    table = _open(path, columns, columns, most)
    if missing := sorted(set(columns) - set(table.schema_arrow.names)):
        raise DataError(f"{path.name}: {missing[0]} is missing")
    total = 0
    for batch in table.iter_batches(batch_size=BATCH, columns=list(columns)):
        for place in range(batch.num_rows):
            row = tuple(batch.column(name)[place].as_py() for name in columns)
            if not all(isinstance(text, str) for text in row):
                raise DataError(f"{path.name}: {', '.join(columns)} are texts")
            total += sum(map(len, row))
            if max(map(len, row)) > longest or total > LIMITS.texts:
                raise DataError(f"{path.name}: texts of too many characters")
            yield row


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Every record of records.parquet. Raises DataError where an id or a size is not right."""
    seen = set()
    for name, text in _texts(path, ("id", "record"), LIMITS.records, LIMITS.record):
        record = json.loads(text)
        if not isinstance(record, dict) or record.get("id") != name or name in seen:
            shown = shorten(one_line(name), 100)
            raise DataError(f"{path.name}: {shown!r} is twice, or not its record's id")
        seen.add(name)
        yield record


def read_items(path: Path) -> pd.DataFrame:
    """The items of items.parquet, its texts as categories."""
    texts = ["cell", "task", "subject"]
    return _open(path, texts, ITEM_COLUMNS, LIMITS.items).read().to_pandas()


def read_changes(path: Path) -> pd.DataFrame:
    """The changed answers of changes.parquet; without such a file none."""
    rows = _texts(path, CHANGE_COLUMNS, LIMITS.changes, LIMITS.entry) if path.exists() else ()
    return pd.DataFrame(rows, columns=list(CHANGE_COLUMNS), dtype=object)
