"""A process that has imported everything and forks a child for every trial: `python warm.py ROOT`.

Reads one request a line (JSON) and answers each with a line. The child does a stage's work in a
folder and is killed, if the request says so, after some seconds, or before or after its k-th
operation on a file of that folder (open to write, rename, remove, mkdir, fsync).
"""

from __future__ import annotations

import builtins
import json
import mmap
import os
import signal
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events, and the place of the path among their arguments.
EVENTS = {"os.rename": 1, "os.remove": 0, "os.mkdir": 0, "os.rmdir": 0, "os.truncate": 0}
AFTER = {"rename": 1, "replace": 1, "remove": 0, "unlink": 0, "mkdir": 0, "rmdir": 0, "fsync": 0}
POLL = 0.001


class Operations:
    """Counts the operations of this process in a folder; kills it at one of them."""

    def __init__(self, folder: Path, shared: mmap.mmap, kill: dict[str, Any] | None) -> None:
        self.folder, self.shared, self.kill = str(folder), shared, kill or {}
        self.started = time.monotonic()
        self.trace: list[tuple[float, str, str]] = []

    def install(self) -> None:
        """Listen from now on; there is no way back."""
        for name, place in AFTER.items():
            setattr(os, name, self._wrapped(getattr(os, name), name, place))
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not flags & WRITES:
                return
        elif event in EVENTS:
            path = arguments[EVENTS[event]]
        else:
            return
        self._count(event, path)

    def _wrapped(self, function: Any, name: str, place: int) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if name == "fsync":
                self._count(name, arguments[0])
            found = function(*arguments, **named)
            self._die("after")
            return found

        return call

    def _count(self, event: str, path: Any) -> None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        name = os.path.abspath(os.fsdecode(path))
        if not name.startswith(self.folder):
            self.here = 0
            return
        name = name.removeprefix(self.folder).strip("/")
        self.trace.append((time.monotonic() - self.started, event, name))
        self.here = len(self.trace)
        text = f"{event} {name}".encode()[:1000]
        self.shared.seek(0)
        self.shared.write(struct.pack("qq", self.here, len(text)) + text)
        self._die("before")

    def _die(self, when: str) -> None:
        if self.here and self.here == self.kill.get("operation") and when == self.kill["when"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if when == "after":
            self.here = 0


def child(request: dict[str, Any], shared: mmap.mmap) -> int:
    """Do a stage in this process; returns its exit code."""
    import stages

    folder = Path(request["folder"])
    os.chdir(folder)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(log), "w", buffering=1) for _ in range(2))
    operations = Operations(folder, shared, request.get("kill"))
    operations.install()
    try:
        code = stages.STAGES[request["stage"]](*request["arguments"])
    except BaseException:
        traceback.print_exc()
        return 1
    seconds = time.monotonic() - operations.started
    with builtins.open(request["log"] + ".trace", "w") as stream:
        json.dump({"seconds": seconds, "operations": operations.trace}, stream)
    return code or 0


def trial(request: dict[str, Any]) -> dict[str, Any]:
    """Fork a child for a request; returns how it ended and the last operation that it counted."""
    shared = mmap.mmap(-1, 4096)
    process = os.fork()
    if process == 0:
        code = 1
        try:
            code = child(request, shared)
        finally:
            os._exit(code)
    limit = request.get("limit", 600)
    due = (request.get("kill") or {}).get("seconds", limit)
    started, late = time.monotonic(), False
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            break
        if time.monotonic() - started > due:
            late = due == limit
            os.kill(process, signal.SIGKILL)
            due = float("inf")
        time.sleep(POLL)
    count, length = struct.unpack("qq", shared[:16])
    return {
        "code": os.waitstatus_to_exitcode(status),
        "late": late,
        "operations": count,
        "last": shared[16 : 16 + length].decode(errors="replace"),
        "seconds": time.monotonic() - started,
    }


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import stages

    stages.warm(Path(sys.argv[1]))
    print("ready", file=answers)
    for line in sys.stdin:
        print(json.dumps(trial(json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
