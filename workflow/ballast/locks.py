"""Locks of folders in which only one process at a time may work: flock on a file `.lock` in them.

The kernel gives a lock back when its last holder ends, however that was, so none is ever stale.
Over NFS, flock holds between machines where the server keeps locks (the default); on a file system
without locks nothing is locked, and one line says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ballast.errors import DataError

NAME = ".lock"
POLL = 0.2  # seconds between tries
INHERITED = "BALLAST_LOCK"  # file descriptor by which a supervised child holds its folder
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def _opened(path: Path) -> int:
    """A lock's file, made for whoever may write to the folder."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def held(
    folder: Path,
    label: str,
    report: Callable[[str], None] = _say,
    check: Callable[[], None] = lambda: None,
    name: str = NAME,
) -> Iterator[int]:
    """Hold `folder` alone while the block runs; waits for whoever holds it, and says so once.

    Yields the file descriptor that holds it: a child that gets it (`pass_fds`) holds it too.
    check: called while waiting; may raise to give up; name: of the file that is locked.
    Raises DataError if the folder cannot be written to.
    """
    handle = _taken(folder, folder / name, label, report, check)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def held_if_free(folder: Path, name: str = NAME) -> Iterator[bool]:
    """Hold `folder` while the block runs, unless another process does; yields whether none does.

    Where nothing can be locked (no such folder, no permission, no locks), none does.
    """
    try:
        handle = _opened(folder / name)
    except OSError:
        yield True
        return
    try:
        free = True
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
        yield free
    finally:
        os.close(handle)


def inherited() -> bool:
    """Whether the process that started this one holds the folder for it.

    The lock then ends with this process, not with programs that it starts.
    """
    text = os.environ.pop(INHERITED, None)
    if text is None:
        return False
    os.set_inheritable(int(text), False)
    return True


def _taken(
    folder: Path, path: Path, label: str, report: Callable[[str], None], check: Callable[[], None]
) -> int:
    waits = False
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = _opened(path)
        except OSError as error:
            raise DataError(f"{folder}: cannot be written to: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(handle).st_nlink:
                _sign(handle)
                return handle
            # The folder was removed while the file was opened.
            os.close(handle)
        except BlockingIOError:
            if not waits:
                report(f"{label}: waiting for another process that works on it, {_signed(handle)}")
            waits = True
            os.close(handle)
            time.sleep(POLL)
            check()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(handle)
                raise DataError(f"{folder}: cannot be locked: {error.strerror}") from None
            report(f"{label}: {folder} is on a file system without locks; run it only once")
            return handle


def _sign(handle: int) -> None:
    """Leave word of who holds the lock; a full disk only costs the word."""
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _signed(handle: int) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return os.pread(handle, 200, 0).decode().strip() or "process unknown"
    return "process unknown"
