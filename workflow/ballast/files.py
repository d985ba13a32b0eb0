"""Atomic writes, checksums and content keys: how anything reaches the disk, and is trusted again.

JSON that is read back is sealed: it carries a checksum of its own content. Tables and other files
stand with their SHA-256 in a sealed file beside them (a record's `files`, a manifest).
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ballast.errors import Damaged, DataError

PART = ".part"
CHECKSUM = "checksum"
DAMAGED = ".damaged"
SUMS = ".checksums.json"  # of a folder: names and SHA-256 of what was written there


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder that replaces `path` when the block ends well.

    A reader sees the old file or the new one, never a part: the bytes are flushed to the disk
    before the rename. What a killed process left of the same file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_parts_of(path)
    handle, guard = _locked_guard(path)
    folder = _guarded(guard)
    temporary = folder / path.name
    try:
        folder.mkdir()
        temporary.touch()
        mode = temporary.stat().st_mode  # as this process's umask has it; libraries know better
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        guard.unlink(missing_ok=True)
        os.close(handle)


def _guarded(guard: Path) -> Path:
    """The folder of the temporary file that a guard stands for.

    The file is not locked itself, and not alone: some libraries write another one beside it, which
    then takes its place.
    """
    return guard.with_name(f"{guard.name}.new")


def _locked_guard(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, locked: while its writer lives, nobody removes what it guards."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)


def remove_parts(folder: Path, pattern: str = f"**/.*{PART}") -> None:
    """Remove temporary files that killed processes left in `folder`; those in use stay."""
    for guard in folder.glob(pattern):
        # Over NFS only a file that is open for writing can be locked.
        with contextlib.suppress(OSError), guard.open("r+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(_guarded(guard), ignore_errors=True)
            guard.unlink()


def remove_parts_of(path: Path) -> None:
    """`remove_parts`, of one file: also where it is whole, and so is not written again."""
    remove_parts(path.parent, f".{glob.escape(path.name)}.*{PART}")


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


def sha256_small(path: Path) -> str:
    """`sha256_file` for files that fit into memory; many times faster where there are many."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def set_aside(path: Path) -> Path:
    """Rename a damaged file or folder to `*.damaged`, over an older one; returns the new path.

    One that another process has set aside already is no error.
    """
    aside = path.with_name(path.name + DAMAGED)
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    with suppress(FileNotFoundError):
        path.replace(aside)
    return aside


def checksum_of(value: Any) -> str:
    """SHA-256 of JSON content, whatever its layout and the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object atomically, its checksum as the last key."""
    # As it is read back: keys are texts then, and tuples lists.
    value = json.loads(json.dumps(value, ensure_ascii=False, allow_nan=False))
    write_json(path, value | {CHECKSUM: checksum_of(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """A JSON object as `write_sealed` was given it; one that an earlier version wrote has no seal.

    Raises Damaged with one line that names the file, if it is missing, damaged or not JSON, and
    DataError if it cannot be read.
    """
    return read_seal(path)[0]


def read_seal(path: Path) -> tuple[dict[str, Any], bool]:
    """`read_sealed`, and whether the content carried a checksum."""
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{path}: missing") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        text = " ".join(str(error).split())[:200]
        raise Damaged(f"{path}: damaged, not JSON: {text}") from None
    if not isinstance(value, dict):
        raise Damaged(f"{path}: damaged, not an object")
    expected = value.pop(CHECKSUM, None)
    if expected is None:
        # A checksum whose own key is damaged is not one that was never there.
        last = next(reversed(value.values()), None)
        if isinstance(last, str) and len(last) == 64:
            raise Damaged(f"{path}: damaged: its checksum cannot be read")
        return value, False
    try:
        found = checksum_of(value)
    except ValueError:  # NaN, which is never written
        found = None
    if found != expected:
        raise Damaged(f"{path}: damaged: the content does not fit its checksum")
    return value, True


def forget_sums(folder: Path, name: str = SUMS) -> None:
    """Remove a folder's checksums before its files are written anew: a run that is killed between
    the files leaves a folder without checksums, not one that looks damaged."""
    (folder / name).unlink(missing_ok=True)


def write_sums(folder: Path, paths: Iterable[Path], name: str = SUMS) -> None:
    """Write the SHA-256 of files below a folder into a sealed file there."""
    sums = {path.relative_to(folder).as_posix(): sha256_file(path) for path in sorted(paths)}
    write_sealed(folder / name, {"files": sums})


def wrong_files(folder: Path, sums: dict[str, str]) -> dict[str, str]:
    """What is wrong by file, of those that `sums` names below a folder; empty if nothing is.

    Raises OSError for a file that is there and cannot be read.
    """
    found = {}
    for name, expected in sums.items():
        try:
            if sha256_file(folder / name) != expected:
                found[name] = "damaged: the content does not fit its checksum"
        except FileNotFoundError:
            found[name] = "missing"
    return found


def check_sums(folder: Path, name: str = SUMS) -> None:
    """Raise Damaged for the first file that is not as `write_sums` saw it.

    A folder without such a file was written by an earlier version, and passes.
    """
    if (folder / name).is_file():
        for file, problem in wrong_files(folder, read_sealed(folder / name)["files"]).items():
            raise Damaged(f"{folder / file}: {problem}")


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
