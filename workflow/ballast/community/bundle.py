"""A bundle: one suite's results in one file, made to be sent to others, who need not trust it.

A zip of the files that `keep` writes and of manifest.json (format, origin, Ballast's version, size
and SHA-256 of every member, the hardware). A bundle that is read is checked for how large it is
before it is unpacked, for what it is, and record by record. It is refused as a whole, with one line
that says why, or believed as a whole; nothing is ever written to a path that it names.
"""

from __future__ import annotations

import json
import stat
import struct
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pandas as pd
import pyarrow as pa

from ballast.community.bundle_checks import LIMITS, check_changes, check_items, check_record
from ballast.community.bundle_tables import read_changes, read_items, read_records
from ballast.errors import DataError
from ballast.escape import one_line, shorten
from ballast.files import replacing, sha256_file
from ballast.keep import CHANGES, ITEMS, RECORDS, keep_suite

FORMAT = 1
KIND = "ballast results"
MANIFEST = "manifest.json"
# \Z, as $ would let a line break pass at the end.
ORIGIN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z"
MEMBERS = (RECORDS, ITEMS)
OPTIONAL = (CHANGES,)
HARDWARE = ("device", "processor", "platform", "threads")
Record = dict[str, Any]

_MEMBER = {
    "type": "object",
    "required": ["bytes", "sha256"],
    "additionalProperties": False,
    "properties": {
        "bytes": {"type": "integer", "minimum": 0},
        "sha256": {"type": "string", "pattern": r"^[0-9a-f]{64}\Z"},
    },
}
SCHEMA = {
    "type": "object",
    "required": ["kind", "format", "origin", "suite", "ballast", "records", "members", "hardware"],
    "additionalProperties": False,
    "properties": {
        "kind": {"const": KIND},
        "format": {"const": FORMAT},
        "origin": {"type": "string", "pattern": ORIGIN},
        "suite": {"type": "string", "minLength": 1, "maxLength": 200},
        "ballast": {"type": "string", "maxLength": 60},
        "records": {"type": "integer", "minimum": 1, "maximum": LIMITS.records},
        "members": {
            "type": "object",
            "required": list(MEMBERS),
            "additionalProperties": False,
            "properties": dict.fromkeys((*MEMBERS, *OPTIONAL), _MEMBER),
        },
        "hardware": {"type": "array", "maxItems": 1000, "items": {"type": "object"}},
    },
}


@dataclass(frozen=True)
class Bundle:
    """What a checked bundle holds: records by id, as they were sent; the items (COLUMNS of
    `items`); some of their changed answers (CHANGE_COLUMNS of `bundle_tables`; entry is JSON)."""

    origin: str
    suite: str
    records: dict[str, Record]
    items: pd.DataFrame
    changes: pd.DataFrame


def check_origin(origin: str) -> str:
    """The origin, if it is one. Raises DataError otherwise."""
    if not jsonschema.Draft202012Validator(SCHEMA["properties"]["origin"]).is_valid(origin):
        raise DataError(
            f"origin {shorten(one_line(origin), 80)!r}: 1 to 64 letters, digits, '_', '.' or '-', "
            "beginning with a letter or a digit"
        )
    return origin


def write_bundle(suite: Path, file: Path, origin: str) -> int:
    """Write a suite's results to `file` as a bundle; returns how many records it holds.

    suite: its folder under results/, or a kept suite. The same results give the same bytes. What is
    written is read back as a receiver would. Raises DataError if anything is damaged or missing.
    """
    check_origin(origin)
    with tempfile.TemporaryDirectory() as place:
        folder = suite
        if not (suite / RECORDS).is_file():
            folder = Path(place)
            keep_suite(suite, folder)
        records = list(read_records(folder / RECORDS))
        names = {record["identity"]["suite"] for record in records}
        if len(names) != 1:
            raise DataError(f"{suite}: records of {len(names)} suites; a bundle has those of one")
        manifest = {
            "kind": KIND,
            "format": FORMAT,
            "origin": origin,
            "suite": names.pop(),
            "ballast": version("ballast"),
            "records": len(records),
            "members": {
                name: _fingerprint(folder / name)
                for name in (*MEMBERS, *OPTIONAL)
                if name in MEMBERS or (folder / name).is_file()
            },
            "hardware": _hardware(records),
        }
        with replacing(file) as temporary:
            _write_zip(temporary, manifest, folder)
            read_bundle(temporary)
    return len(records)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _hardware(records: list[Record]) -> list[dict[str, Any]]:
    """What the records were made on, each machine once."""
    seen = {json.dumps({k: r["provenance"].get(k) for k in HARDWARE}) for r in records}
    return [json.loads(text) for text in sorted(seen)]


def _write_zip(path: Path, manifest: dict[str, Any], folder: Path) -> None:
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(_entry(MANIFEST), text.encode())
        for name in manifest["members"]:
            # Parquet is compressed already.
            archive.writestr(_entry(name, zipfile.ZIP_STORED), (folder / name).read_bytes())


def _entry(name: str, how: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    """A member without a time of its own, so that equal results are equal bytes."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type, entry.external_attr = how, 0o100644 << 16
    return entry


def read_bundle(file: Path) -> Bundle:
    """Read and check a bundle. Raises DataError with one line that says what is wrong with it."""
    try:
        return _read(file)
    except pa.ArrowException as error:
        raise DataError(f"damaged parquet: {_short(error)}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"damaged, not a bundle: {_short(error)}") from None
    except (UnicodeError, ValueError, RecursionError, NotImplementedError) as error:
        raise DataError(f"not a bundle: {_short(error)}") from None
    except OSError as error:
        raise DataError(f"cannot be read: {_short(error.strerror or error)}") from None


def _short(error: object) -> str:
    return shorten(one_line(str(error)), 200)


def _read(file: Path) -> Bundle:
    about = file.lstat()
    if not stat.S_ISREG(about.st_mode):
        raise DataError("not a plain file (a link or a folder)")
    if about.st_size > LIMITS.file:
        raise DataError(f"{about.st_size:,} bytes; a bundle has at most {LIMITS.file:,}")
    _check_end(file)
    with zipfile.ZipFile(file) as archive, tempfile.TemporaryDirectory() as place:
        entries = _entries(archive)
        manifest = _manifest(archive, entries[MANIFEST])
        if unnamed := sorted(set(entries) - {MANIFEST, *manifest["members"]}):
            raise DataError(f"{unnamed[0]}: its manifest does not name it")
        for name in manifest["members"]:
            if name not in entries:
                raise DataError(f"without {name}")
            _unpack(archive, entries[name], manifest["members"][name], Path(place) / name)
        records = {r["id"]: r for r in read_records(Path(place) / RECORDS)}
        if len(records) != manifest["records"]:
            raise DataError(f"{len(records)} records; its manifest says {manifest['records']}")
        for record in records.values():
            check_record(record, manifest["origin"], manifest["suite"])
        items = read_items(Path(place) / ITEMS)
        changes = read_changes(Path(place) / CHANGES)
    check_items(items, records)
    check_changes(changes, records)
    return Bundle(manifest["origin"], manifest["suite"], records, items, changes)


def _check_end(file: Path) -> None:
    """A zip's last record says how long its table of contents is: long ones are not even read."""
    with file.open("rb") as stream:
        stream.seek(-min(42, file.stat().st_size), 2)
        tail = stream.read()
    if len(tail) < 42 or tail[20:24] != b"PK\x05\x06" or tail[40:42] != b"\0\0":
        raise DataError("not a bundle: not a zip file, or one with a comment")
    contents = struct.unpack("<L", tail[32:36])[0]
    if tail[:4] == b"PK\x06\x07" or contents > 4096:
        raise DataError("not a bundle: too many members")


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members by name, if they are those of a bundle and not too large."""
    entries = archive.infolist()
    names = [entry.orig_filename for entry in entries]
    expected = {MANIFEST, *MEMBERS}
    for name in names:
        known = name in expected or name in OPTIONAL
        if not known or names.count(name) > 1:
            why = "twice" if known else "not a member of a bundle"
            raise DataError(f"{shorten(one_line(name), 100)!r}: {why}")
    if missing := sorted(expected - set(names)):
        raise DataError(f"without {', '.join(missing)}")
    for entry in entries:
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise DataError(f"{entry.filename}: a link")
        if entry.flag_bits & 1:
            raise DataError(f"{entry.filename}: encrypted")
    size = sum(entry.file_size for entry in entries)
    if size > LIMITS.unpacked:
        raise DataError(f"{size:,} bytes unpacked; at most {LIMITS.unpacked:,}")
    return dict(zip(names, entries, strict=True))


def _manifest(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> dict[str, Any]:
    if entry.file_size > LIMITS.manifest:
        raise DataError(f"{MANIFEST}: {entry.file_size:,} bytes; at most {LIMITS.manifest:,}")
    manifest = json.loads(archive.read(entry))
    worst = jsonschema.exceptions.best_match(
        jsonschema.Draft202012Validator(SCHEMA).iter_errors(manifest)
    )
    if worst is not None:
        where = ".".join([MANIFEST, *(str(part) for part in worst.absolute_path)])
        raise DataError(f"{where}: {_short(worst.message)}")
    return manifest


def _unpack(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, said: dict[str, Any], path: Path
) -> None:
    """Copy a member to `path` if it has the size and the hash that the manifest says."""
    if entry.file_size != said["bytes"]:
        raise DataError(f"{entry.filename}: {entry.file_size} bytes; its manifest says otherwise")
    with archive.open(entry) as source, path.open("w+b") as target:
        while block := source.read(2**20):
            target.write(block)
        target.seek(0)
        if file_digest(target, "sha256").hexdigest() != said["sha256"]:
            raise DataError(f"{entry.filename}: its hash is not the manifest's")
