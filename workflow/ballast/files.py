"""Atomic writes, checksums and content keys: how anything reaches the disk."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PART = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder that replaces `path` when the block ends well.

    A reader sees the old file or the new one, never a part: the bytes are flushed to the disk
    before the rename. What a killed process left of the same file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts(path.parent, f".{glob.escape(path.name)}.*{PART}")
    handle, temporary = _locked_part(path)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(handle)


def _locked_part(path: Path) -> tuple[int, Path]:
    """A new temporary file beside `path`, locked: while its writer lives, nobody removes it."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)


def remove_parts(folder: Path, pattern: str = f"**/.*{PART}") -> None:
    """Remove temporary files that killed processes left in `folder`; those in use stay."""
    for part in folder.glob(pattern):
        with contextlib.suppress(OSError), part.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given, floats exact."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def key_of(*parts: Any, length: int = 16) -> str:
    """Short hex digest of JSON-serialisable parts; dictionaries count by content, not by order."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def key_of_files(*paths: Path) -> str:
    """Short hex digest of the names and bytes of files; folders count with all they hold."""
    files: list[Path] = []
    for path in paths:
        files += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return key_of([[file.name, sha256_file(file)] for file in files])
