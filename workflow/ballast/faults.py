"""Errors of the machine, which are nobody's result: a full disk, no permission, a disk that fails.

A method that raises has failed, and its record says so. An error of the machine says nothing about
the method: the job ends, with one line that names the file and the disk, and a later run tries it
again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ballast.errors import BallastError, DataError

# What a disk, a mount or the system's own limits answer; never what a method computes.
MACHINE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the disk or a limit allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "not permitted",
    errno.EIO: "the disk failed to read or write",
    errno.ESTALE: "the network disk lost the file",
    errno.ENXIO: "the disk is gone",
    errno.ENODEV: "the disk is gone",
    errno.ENOTCONN: "the network disk is gone",
    errno.ETIMEDOUT: "the network disk does not answer",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files on the machine",
}
# safetensors and others written in Rust put the system's error into the text of their own.
_RUST = re.compile(r"\bos error (\d+)\b|\bcode: (\d+)\b")


def fault_of(error: BaseException | None, home: Path | None = None) -> str | None:
    """One line about an error of the machine, with the disk's space where it is full; else None.

    home: a folder of results; a file that is gone from it is nobody's own error either. An error
    that was raised while another one was handled counts by that one too.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        number = getattr(error, "errno", None) if isinstance(error, OSError) else None
        if number is None and type(error).__module__.split(".")[0] in ("safetensors", "builtins"):
            found = _RUST.search(str(error)) if "rror" in str(error) else None
            number = int(found[1] or found[2]) if found else None
        path = getattr(error, "filename", None)
        path = Path(os.fsdecode(path)) if isinstance(path, str | bytes) else None
        if number in MACHINE:
            return _line(number, path or home)
        if number == errno.ENOENT and path is not None and home is not None:
            with contextlib.suppress(OSError):
                if path.resolve().is_relative_to(home.resolve()):
                    return f"{path}: is gone; run again"
        error = error.__cause__ or error.__context__
    return None


def _line(number: int, path: Path | None) -> str:
    text = MACHINE[number]
    if number in (errno.ENOSPC, errno.EDQUOT) and path is not None:
        place = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
        with contextlib.suppress(OSError):
            text += f" ({shutil.disk_usage(place).free / 2**20:.0f} MiB free)"
    advice = {
        errno.ENOSPC: "make space", errno.EDQUOT: "make space", errno.EROFS: "make it writable",
        errno.EACCES: "allow it", errno.EPERM: "allow it",
    }.get(number, "see to it")  # fmt: skip
    return f"{path or 'the disk'}: {text}; {advice} and run again, nothing finished is lost"


def check_writable(folder: Path) -> None:
    """Raise DataError if nothing can be written to a folder, before any work starts."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(folder)
        raise DataError(fault_of(error, folder) or f"{folder}: {error.strerror}") from None


@contextlib.contextmanager
def told_in_one_line(what: str, log: IO[str] | None = None) -> Iterator[None]:
    """End the process with one line, in the log too, for errors of data or of the machine."""
    try:
        yield
    except BallastError as error:
        text = str(error)
    except Exception as error:
        text = fault_of(error, Path("results")) or ""
        if not text:
            raise
    else:
        return
    print(f"{what}: error: {text}", file=sys.stderr, flush=True)
    if log is not None:
        with contextlib.suppress(OSError):  # the log's own disk may be the full one
            print(f"error: {text}", file=log, flush=True)
    sys.exit(1)
