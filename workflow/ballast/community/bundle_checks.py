"""What a record and its items from elsewhere must be before they may stand beside our own."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ballast.churn import FORMS
from ballast.errors import DataError
from ballast.escape import one_line, shorten
from ballast.records import validate_record

Record = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """How large a bundle may be: bytes, characters of text, or how many.

    file: the bundle; unpacked: all its members; manifest; record, texts: one record and all of
    them; values: in one record; names: measurements and tasks of a record, which become columns;
    changes, entry: changed answers, and one of them; name: a title; identity: what "ORIGIN:" leaves
    of an id's 255 characters.
    """

    file: int = 256 * 2**20
    unpacked: int = 2**30
    manifest: int = 2**20
    record: int = 2**20
    texts: int = 2**28
    records: int = 20_000
    items: int = 50_000_000
    changes: int = 200_000
    entry: int = 10_000
    values: int = 20_000
    names: int = 500
    name: int = 200
    identity: int = 190


LIMITS = Limits()
# Their score is the mean over items; others (a correlation, a perplexity) are not.
MEANS = ("accuracy", "exact_match")


def check_record(record: Record, origin: str, suite: str) -> None:
    """Raise DataError unless the record is valid, of this origin and suite, and of plain text."""
    name = shorten(one_line(str(record.get("id"))), 80)
    try:
        # Python reads integers of any length; nothing that counts here is near these bounds.
        count = sum(_small(value) for value in _leaves(record))
        if count > LIMITS.values:
            raise DataError(f"{count:,} values; at most {LIMITS.values:,}")
        json.dumps(record, ensure_ascii=False).encode()
        validate_record(record)
        if len(record["id"]) > LIMITS.identity:
            raise DataError(f"an id has at most {LIMITS.identity} characters")
        if record.get("origin", origin) != origin:
            raise DataError(f"origin: {record['origin']}, in a bundle of {origin}")
        if record["identity"]["suite"] != suite:
            raise DataError(f"identity.suite: {record['identity']['suite']!r}, not {suite!r}")
        _check_names(record)
    except UnicodeEncodeError:
        raise DataError(f"{name}: holds half of a character") from None
    except DataError as error:
        raise DataError(f"{name}: {shorten(one_line(str(error)), 200)}") from None


def _leaves(value: Any) -> Iterator[Any]:
    """Every value and key in nested dictionaries and lists; no recursion, however deep they are."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            yield from value
            left.extend(value.values())
        elif isinstance(value, list):
            left.extend(value)
        else:
            yield value


def _small(value: Any) -> bool:
    if isinstance(value, int) and abs(value) >= 2**63:
        raise DataError("a number of more than 63 bits")
    return True


def _check_names(record: Record) -> None:
    """What is shown as a name is one line of visible characters, and there are not too many."""
    identity, tasks = record["identity"], record["tasks"]
    names = [record["id"], *identity["parents"], *record["method"].values(), *tasks]
    names += [identity[key] for key in ("suite", "base", "target", "method", "variant")]
    names += [text for task in tasks.values() for text in (task["title"], task["metric"])]
    names += [*record["report"], *record.get("drift", {}), *record["costs"], *record["files"]]
    names += [
        key for block in ("scores", "base_scores") for s in record[block].values() for key in s
    ]
    if len(names) > LIMITS.names:
        raise DataError(f"{len(names)} names of tasks and measurements; at most {LIMITS.names}")
    for text in names:
        if len(text) > LIMITS.name or not _plain(text):
            raise DataError(
                f"{shorten(one_line(text), 60)!r}: not a name (one line of at most {LIMITS.name} "
                "visible characters)"
            )


def _plain(text: str) -> bool:
    """No control characters, line breaks, or marks that reorder the text around them."""
    return not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)


def check_items(items: pd.DataFrame, records: dict[str, Record]) -> None:
    """Raise DataError unless the items are as many as their records count, with such scores.

    items: columns of `results.ITEM_COLUMNS`, cell, task, item and score at least. A cell without
    items is none the worse: what was scored before they were stored has none.
    """
    for name in ("cell", "task", "item", "score"):
        if name not in items or items[name].isna().any():
            raise DataError(f"items.parquet: {name} is missing")
    for name, (low, high) in _RANGES.items():
        _check_numbers(items, name, low, high)
    groups = items.groupby(["cell", "task"], observed=True, sort=False)
    found = groups.agg(n=("item", "size"), different=("item", "nunique"), mean=("score", "mean"))
    for (cell, task), n, different, mean in found.itertuples():
        _check_group(records.get(cell), f"{cell}, {task}", task, n, different, mean)


_RANGES = {
    "item": (0, 2**31 - 1), "score": (0, 1), "base_score": (0, 1), "loss": (0, np.inf),
    "base_loss": (0, np.inf), "form": (0, len(FORMS) - 1), "base_form": (0, len(FORMS) - 1),
}  # fmt: skip


def _check_numbers(items: pd.DataFrame, name: str, low: float, high: float) -> None:
    if name not in items or items[name].isna().all():
        return
    if not pd.api.types.is_numeric_dtype(items[name]):
        raise DataError(f"items.parquet: {name} is not of numbers")
    known = items[name].dropna().to_numpy(dtype="float64")
    if not ((known >= low) & (known <= high) & np.isfinite(known)).all():
        raise DataError(f"items.parquet: {name} is not in {low} to {high}")


def _check_group(
    record: Record | None, where: str, task: str, n: int, different: int, mean: float
) -> None:
    where = f"items.parquet: {shorten(one_line(where), 120)}"
    if record is None or record["status"] != "ok" or task not in record["tasks"]:
        raise DataError(f"{where}: no record has such items")
    score = record["scores"][task]
    if n != score["n"] or different != n:
        raise DataError(f"{where}: {different} different items of {n}; its record has {score['n']}")
    facts = record["tasks"][task]
    averaged = facts["metric"] in MEANS and facts["unit"] == "points"
    if averaged and abs(100 * mean - score["value"]) > 0.01:
        raise DataError(f"{where}: mean {100 * mean:.2f}, but the record's score is otherwise")


_TEXTS = ("question", "reference", "before", "after")


def check_changes(changes: pd.DataFrame, records: dict[str, Record]) -> None:
    """Raise DataError unless every changed answer is of a record's task and made of short texts."""
    for row in changes.to_dict("records"):
        record = records.get(row.get("cell"))
        if record is None or row.get("task") not in record["tasks"]:
            raise DataError("changes.parquet: no record has such a task")
        if row.get("kind") not in ("gained", "forgotten"):
            raise DataError("changes.parquet: kind is gained or forgotten")
        entry = json.loads(row["entry"]) if isinstance(row.get("entry"), str) else None
        if not isinstance(entry, dict) or set(entry) != {"item", *_TEXTS}:
            raise DataError(f"changes.parquet: an entry has item, {', '.join(_TEXTS)}")
        if type(entry["item"]) is not int or not all(isinstance(entry[k], str) for k in _TEXTS):
            raise DataError("changes.parquet: an entry has a number and four texts")
        row["entry"].encode()
        json.dumps(entry, ensure_ascii=False).encode()
