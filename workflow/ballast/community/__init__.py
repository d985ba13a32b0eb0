"""Results from other machines: packed there, merged here beside our own, never among them.

`results/SUITE/incoming/` takes bundles; `results/SUITE/community/ORIGIN/` holds what was merged:
records.parquet, items.parquet and, if there are any, changes.parquet, as `keep` writes them. A
record that is there stays as it is, whatever comes later. Read back, ids are `ORIGIN:ID`, so that
rows of another origin stay rows of their own in every table.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ballast.community.bundle import Bundle, check_origin, read_bundle, write_bundle
from ballast.community.bundle_tables import CHANGE_COLUMNS
from ballast.errors import DataError
from ballast.escape import one_line, shorten
from ballast.files import SUMS, check_sums, forget_sums, remove_parts, replacing, write_sums
from ballast.items import COLUMNS as ITEM_COLUMNS
from ballast.keep import CHANGES, ITEMS, RECORDS
from ballast.locks import held
from ballast.records import validate_record

Record = dict[str, Any]
INCOMING, COMMUNITY = "incoming", "community"
AGAIN = "remove this folder and merge its bundles again"
pack = write_bundle


@dataclass
class Report:
    """What a merge did. added, known: records by origin; refused: one line each; read: bundles."""

    inbox: Path
    read: int = 0
    added: dict[str, int] = field(default_factory=dict)
    known: dict[str, int] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for people, one fact a line."""
        if not self.read:
            return [
                f"{self.inbox}: no bundles; put files of `ballast pack` there, then merge again"
            ]
        found = [
            f"{origin}: {count} records merged, {self.known.get(origin, 0)} already there"
            for origin, count in sorted(self.added.items())
        ]
        return [*found, *(f"refused: {line}" for line in self.refused)]


def merge(source: Path, suite: Path) -> Report:
    """Merge a bundle, or every file of an inbox, into suite/community/; returns what was done.

    suite: the suite's folder under results/. A bundle that is not as it should be is refused and
    the others are merged. A record that is there already, by origin and id, is left alone: the same
    again is counted as known, another one is refused. Merging again changes no byte.
    """
    report = Report(source)
    for file in _bundles(source):
        report.read += 1
        name = shorten(one_line(file.name), 100)
        try:
            bundle = read_bundle(file)
            if bundle.suite != suite.resolve().name:
                raise DataError(
                    f"results of suite {bundle.suite!r}, not of {suite.resolve().name!r}"
                )
            with held(suite, "merge", name=".merge.lock"):
                remove_parts(suite / COMMUNITY)
                refused = _take(bundle, suite / COMMUNITY, report)
        except DataError as error:
            refused = [str(error)]
        report.refused += [f"{name}: {one_line(reason)}" for reason in refused]
    return report


def _bundles(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source] if source.exists() else []
    return sorted(path for path in source.iterdir() if not path.name.startswith("."))


def _take(bundle: Bundle, community: Path, report: Report) -> list[str]:
    """Add a bundle's new records to its origin's folder; returns why others were refused."""
    folder = _folder(bundle.origin, community)
    records, items = _read_origin(folder) if folder.is_dir() else ({}, _no_items())
    new = {name: record for name, record in bundle.records.items() if name not in records}
    shared = [name for name in bundle.records if name in records]
    refused = [
        f"{name}: another record of this id is there already from {bundle.origin}; it stays"
        for name in _different(shared, records, items, bundle)
    ]
    for counts, count in (
        (report.added, len(new)), (report.known, len(shared) - len(refused))
    ):  # fmt: skip
        counts[bundle.origin] = counts.get(bundle.origin, 0) + count
    if new:
        extra = bundle.items[bundle.items["cell"].isin(new)]
        changes = bundle.changes[bundle.changes["cell"].isin(new)]
        forget_sums(folder)
        if len(changes):
            _write(pd.concat([_changes(folder, records), changes]), folder / CHANGES)
        _write_origin(folder, records | new, _joined(items, extra))
    elif not refused and not (folder / SUMS).is_file():
        # Who wrote the files was killed before this.
        _seal(folder)
    return refused


def _folder(origin: str, community: Path) -> Path:
    """The origin's folder. On some disks names that differ in case alone are the same folder."""
    others = [path.name for path in community.iterdir()] if community.is_dir() else []
    for other in others:
        if other.lower() == origin.lower() and other != origin:
            raise DataError(f"origin {origin!r}: {other!r} is there, which differs in case alone")
    return community / origin


def _different(
    shared: list[str], records: dict[str, Record], items: pd.DataFrame, bundle: Bundle
) -> list[str]:
    """Those of the shared records that are not the same as ours, record and items."""
    before, after = (_scores_by_cell(frame, shared) for frame in (items, bundle.items))
    return [
        name
        for name in shared
        if _text(records[name]) != _text(bundle.records[name])
        or before.get(name) != after.get(name)
    ]


def _scores_by_cell(items: pd.DataFrame, cells: list[str]) -> dict[str, int]:
    """A number for each cell that changes with any value of its items, not with their order."""
    kept = _plain_items(items[items["cell"].isin(cells)])
    hashes = pd.util.hash_pandas_object(kept, index=False)
    return hashes.groupby(kept["cell"].to_numpy()).sum().to_dict()


def _text(record: Record) -> str:
    return json.dumps(record, sort_keys=True, ensure_ascii=False, allow_nan=False)


def _no_items() -> pd.DataFrame:
    return _plain_items(pd.DataFrame(columns=["cell", "task", "item", "score"]))


_TYPES = {
    "cell": "object", "task": "object", "item": "int32", "subject": "object", "score": "float32",
    "loss": "float32", "form": "Int8", "base_score": "float32", "base_loss": "float32",
    "base_form": "Int8",
}  # fmt: skip


def _plain_items(items: pd.DataFrame) -> pd.DataFrame:
    """All item columns, with one type each, so that frames of any age can be joined."""
    frame = items.reindex(columns=list(ITEM_COLUMNS)).astype(_TYPES)
    return frame.assign(subject=frame["subject"].fillna(""))


def _joined(items: pd.DataFrame, extra: pd.DataFrame) -> pd.DataFrame:
    frame = pd.concat([_plain_items(items), _plain_items(extra)], ignore_index=True)
    return frame.sort_values(["cell", "task", "item"], ignore_index=True, kind="stable")


def _write_origin(folder: Path, records: dict[str, Record], items: pd.DataFrame) -> None:
    """Items first: items without a record are nothing, a record without its items is damage."""
    names = sorted(records)
    texts = [json.dumps(records[name], ensure_ascii=False, allow_nan=False) for name in names]
    tables = {ITEMS: items, RECORDS: pd.DataFrame({"id": names, "record": texts})}
    for name, table in tables.items():
        _write(table, folder / name)
    _seal(folder)


def _seal(folder: Path) -> None:
    written = [folder / name for name in (CHANGES, ITEMS, RECORDS) if (folder / name).is_file()]
    write_sums(folder, written)


def _write(table: pd.DataFrame, path: Path) -> None:
    with replacing(path) as temporary:
        table.to_parquet(temporary, index=False, compression="zstd")


def _changes(folder: Path, records: Collection[str]) -> pd.DataFrame:
    """Changed answers merged from one origin; those of cells without a record are left out."""
    if not (folder / CHANGES).is_file():
        return pd.DataFrame(columns=list(CHANGE_COLUMNS), dtype=object)
    found = pd.read_parquet(folder / CHANGES, columns=list(CHANGE_COLUMNS))
    return found[found["cell"].isin(records)].astype(object)


def read_community_changes(suite: Path) -> pd.DataFrame:
    """Changed answers merged into a suite, as `keep.read_kept_changes` gives them; cells are
    `ORIGIN:ID`. Raises DataError if a file is damaged."""
    home = suite / COMMUNITY
    folders = sorted(p for p in home.iterdir() if p.is_dir()) if home.is_dir() else []
    frames = [pd.DataFrame(columns=list(CHANGE_COLUMNS), dtype=object)]
    for folder in folders:
        records, _ = _read_origin(folder)
        found = _changes(folder, records)
        entries = [json.loads(text) for text in found["entry"]]
        frames.append(found.assign(cell=folder.name + ":" + found["cell"], entry=entries))
    return pd.concat(frames, ignore_index=True)


def _read_origin(folder: Path) -> tuple[dict[str, Record], pd.DataFrame]:
    """What was merged from one origin. Raises DataError with the file's name if it is damaged."""
    try:
        check_sums(folder)
        table = pd.read_parquet(folder / RECORDS)
        records = {
            name: json.loads(text) for name, text in zip(table["id"], table["record"], strict=True)
        }
        items = pd.read_parquet(folder / ITEMS)
        return records, items[items["cell"].isin(records)]
    except FileNotFoundError as error:
        if not (folder / RECORDS).exists():
            return {}, _no_items()
        raise DataError(f"{folder}: {Path(str(error.filename)).name} is gone; {AGAIN}") from None
    except (OSError, ValueError, KeyError, DataError) as error:
        text = shorten(one_line(str(error)), 200)
        raise DataError(f"{folder}: damaged: {text}; {AGAIN}") from None


def read_community(
    suite: Path, problems: list[str] | None = None
) -> tuple[list[Record], pd.DataFrame]:
    """Everything merged into a suite: records with `origin`, and their items.

    Ids, cells and parents are `ORIGIN:ID`, which no id of our own can be taken for. Sorted by
    origin and id. problems: takes a line for each origin whose files are damaged; without it such
    files raise DataError.
    """
    found: list[Record] = []
    frames = [_no_items()]
    home = suite / COMMUNITY
    for folder in sorted(home.iterdir()) if home.is_dir() else []:
        if not folder.is_dir():
            continue
        try:
            origin = check_origin(folder.name)
            records, items = _read_origin(folder)
            for record in records.values():
                validate_record(record)
        except DataError as error:
            if problems is None:
                raise
            problems.append(str(error))
            continue
        found += [_labelled(record, origin) for record in records.values()]
        frames.append(_plain_items(items).assign(cell=origin + ":" + items["cell"].astype(object)))
    return found, pd.concat(frames, ignore_index=True)


def _labelled(record: Record, origin: str) -> Record:
    identity = record["identity"]
    parents = [f"{origin}:{parent}" for parent in identity["parents"]]
    new = {"id": f"{origin}:{record['id']}", "identity": identity | {"parents": parents}}
    return record | new | {"origin": origin}


def revisions(own: Iterable[Record], others: Iterable[Record]) -> dict[str, str]:
    """What is not the same about the records of others, by id; those alike are left out.

    Compared with our own records of the same base and target: the base and data (their keys), the
    base's files, the tasks and evaluation code, and the method's file. Rows that differ in base or
    data answer another question; they are shown with this label and never averaged with ours.
    """
    known: dict[tuple[str, ...], set[str]] = {}
    for record in own:
        for place, value in _revision(record).items():
            known.setdefault(place, set()).add(value)
    found = {}
    for record in others:
        labels = [
            _LABELS[place[0]]
            for place, value in _revision(record).items()
            if place in known and value not in known[place]
        ]
        if labels:
            found[record["id"]] = "; ".join(labels)
    return found


_LABELS = {
    "base": "another revision of the base",
    "weights": "the base has other weights",
    "data": "another revision of the data",
    "eval": "scored by other tasks or code",
    "method": "another version of the method's file",
}


def _revision(record: Record) -> dict[tuple[str, ...], str]:
    """What a record depends on, each under what it can be compared by."""
    identity, keys = record["identity"], record["keys"]
    base, target, method = (identity[key] for key in ("base", "target", "method"))
    found = {
        ("base", base): keys["base"],
        ("data", base, target): keys["data"],
        ("eval", base, target): keys["eval"],
        ("method", method): record["method"]["digest"],
    }
    made = record["provenance"].get("base")
    files = made.get("files") if isinstance(made, dict) else None
    if isinstance(files, dict):
        weights = {k: v for k, v in files.items() if str(k).endswith((".safetensors", ".bin"))}
        found["weights", base] = json.dumps(weights, sort_keys=True)
    return found
