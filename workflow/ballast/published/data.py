"""The papers' tables as data: `results/published/*.csv`, and their `protocols.yaml`."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ballast.errors import DataError, SuiteError, unknown
from ballast.layout import Layout

COLUMNS = (
    "source", "paper", "table", "protocol", "model", "target", "method", "label", "rank",
    "variant", "tuned", "task", "role", "metric", "unit", "better", "value", "spread", "n_seeds",
    "learning_rate", "parameters", "parameters_percent", "evidence", "note",
)  # fmt: skip
NUMBERS = ("value", "spread", "learning_rate", "parameters_percent")
COUNTS = ("rank", "n_seeds", "parameters")
ROLES = ("target", "upstream", "both", "cost", "other")
EVIDENCE = ("P", "C", "P/C", "S", "I", "T", "U")
# What tells one published number from another; no two rows share it.
IDENTITY = (
    "source", "protocol", "model", "target", "label", "rank", "variant", "tuned", "task", "metric",
)  # fmt: skip


def _folder() -> Path:
    return Layout.here().root / "results" / "published"


def read_published(folder: Path | None = None) -> pd.DataFrame:
    """Every published number, one row each, in the order of the files' names and rows.

    Text columns are "" where nothing is known; `value`, `spread`, `learning_rate` and
    `parameters_percent` are float64, `rank`, `n_seeds` and `parameters` Int64, missing where not
    known. Raises DataError that names the file, the row and the column.
    """
    return _published(folder or _folder()).copy()


@cache
def _published(folder: Path) -> pd.DataFrame:
    frames = [_read(path) for path in sorted(folder.glob("*.csv"))]
    if not frames:
        raise DataError(f"{folder}: no published tables (*.csv)")
    rows = pd.concat(frames, ignore_index=True)
    check_published(rows, protocols(folder))
    return rows


def _read(path: Path) -> pd.DataFrame:
    text = pd.read_csv(path, dtype=str, keep_default_na=False)
    if tuple(text.columns) != COLUMNS:
        wrong = sorted(set(text.columns) ^ set(COLUMNS)) or ["their order"]
        raise DataError(f"{path}: columns are not those of a published table: {', '.join(wrong)}")
    return typed(text, str(path))


def typed(text: pd.DataFrame, where: str) -> pd.DataFrame:
    """Rows of text with their columns' types; `where` names them in the error."""
    rows = text.astype(object)
    for name in (*NUMBERS, *COUNTS):
        column = rows[name].replace("", None)
        numbers = pd.to_numeric(column, errors="coerce")
        bad = numbers.isna() & column.notna()
        if name in COUNTS:
            bad |= numbers.notna() & (numbers % 1 != 0)
        if bad.any():
            at = bad.idxmax()
            raise DataError(f"{where}: row {at + 1}: {name} {rows[name][at]!r} is not a number")
        rows[name] = numbers.astype("Int64" if name in COUNTS else "float64")
    for name in set(COLUMNS) - set(NUMBERS) - set(COUNTS):
        rows[name] = rows[name].fillna("").astype("string")
    return rows


def check_published(rows: pd.DataFrame, known: dict[str, Any]) -> None:
    """Raise DataError for a word that a column does not allow or two rows that say the same."""
    allowed = {
        "protocol": {*known, ""},
        "role": set(ROLES),
        "tuned": {"yes", "no"},
        "better": {"higher", "lower"},
        "evidence": set(EVIDENCE),
    }
    for name, words in allowed.items():
        wrong = ~rows[name].isin(words)
        if wrong.any():
            row = rows[wrong].iloc[0]
            raise DataError(
                f"published {row['source']}, {row['label']}: {name} {row[name]!r}; "
                f"allowed: {', '.join(sorted(words - {''}))}"
            )
    twice = rows[rows.duplicated(list(IDENTITY))]
    if len(twice):
        row = twice.iloc[0]
        raise DataError(f"published {row['source']}: {row['label']}, {row['task']} stands twice")


def protocols(folder: Path | None = None) -> dict[str, dict[str, Any]]:
    """How the published numbers were made, by key. Raises DataError for a damaged file."""
    return _protocols(folder or _folder())


@cache
def _protocols(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / "protocols.yaml"
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(v, dict) for v in found.values()):
        raise DataError(f"{path}: a mapping of keys to mappings is expected")
    return found


def check_protocol(key: str | None, known: Iterable[str] | None = None) -> None:
    """Raise SuiteError if a suite's `protocol` is not one of the published ones."""
    known = list(protocols()) if known is None else known
    if key is not None and key not in known:
        raise SuiteError(f"protocol: {unknown('protocol', key, known)}")
