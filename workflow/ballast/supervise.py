"""Runs a cell as a child process, within limits, and tied to the life of whoever started it.

The supervisor imports no torch: it stays small beside the child, sees its end whatever the cause,
and writes the record that a killed child cannot write.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import IO, Any

import psutil

from ballast.devices import Lease, lease
from ballast.errors import BallastError, DataError
from ballast.layout import Layout
from ballast.limits import limits_at
from ballast.locks import INHERITED, held
from ballast.orphans import MARK, kill_marked, kill_orphans, mark, run_lives, seldom, tied_to
from ballast.outcome import (
    BROKEN,
    OUT_OF_MEMORY,
    RECORD,
    cell_folder,
    failed_record,
    write_record,
)
from ballast.plan import read_plan
from ballast.progress import PIPE, Watcher
from ballast.records import read_path, status_of
from ballast.resident import Family

POLL = 0.5  # seconds between looks at the child
# By these signals others end a cell: a person, the kernel out of memory for someone else's sake.
# Where nothing is tried again it goes on once, so that not the first is held against the method.
FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGHUP}
UNFLUSHED = 120  # Python's exit code where its last lines could not be written
# A log that grows beyond the first is cut to the second, both in bytes, and goes on.
LOG_MOST, LOG_KEPT = 64 << 20, 1 << 20


@dataclass(frozen=True)
class End:
    """How a child ended: kind is None if it finished by itself, else oom, time or killed.

    began: whether it said that it had its libraries and its work, and so fails on its own account;
    said: its own word that data, the base or the machine failed, which is no result.
    """

    code: int
    kind: str | None
    reason: str
    peak_mb: float
    began: bool = False
    said: str = ""


class Orphaned(BallastError):
    """The process that started the supervisor is gone."""


def run_limited(
    command: list[str],
    seconds: float,
    memory_mb: float,
    output: IO[str] | None = None,
    watcher: Watcher | None = None,
    lock: int | None = None,
    gpus: Lease | None = None,
) -> End:
    """Run a command to its end or to a limit; its output goes to `output` (None: inherited).

    seconds: wall time; memory_mb: what the child and its children may hold (`resident`); lock:
    file descriptor by which the child holds its folder (`locks.held`) for as long as it lives;
    gpus: those lent to the child (None: it sees what this process sees).
    Nothing that the child started is left. Raises Orphaned, with the child killed, if the process
    that started this one has died.
    """
    lives, started, peak = run_lives(), time.monotonic(), 0.0
    passed = {PIPE: watcher.write} if watcher else {}
    passed |= {} if lock is None else {INHERITED: lock}
    gpus = gpus or Lease()
    bounded = _bounded(output)
    child = subprocess.Popen(
        command,
        stdout=output,
        stderr=output,
        stdin=subprocess.DEVNULL,
        preexec_fn=tied_to(os.getpid()),
        pass_fds=(*passed.values(), *gpus.files),
        env=os.environ
        | {name: str(fd) for name, fd in passed.items()}
        | {MARK: mark()}
        | gpus.environment,
    )
    family = Family(child.pid, mark())
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        while True:
            try:
                code = child.wait(timeout=POLL)
                break
            except subprocess.TimeoutExpired:
                pass
            if watcher:
                watcher.look()
            bounded()
            peak = max(peak, family.held_mb())
            if peak > memory_mb:
                reason = f"used {peak:.0f} MB, limit {memory_mb:.0f} MB"
                return End(_kill(child), "oom", reason, peak)
            if time.monotonic() - started > seconds:
                reason = f"not finished after {seconds / 60:.3g} minutes, the limit"
                return End(_kill(child), "time", reason, peak)
            if not lives():
                raise Orphaned("the run that started this cell has ended")
    finally:
        _kill(child)
        kill_marked(mark())
        signal.signal(signal.SIGTERM, handler)
        if watcher:
            watcher.look()
            watcher.close()
        bounded()
    began = watcher is not None and watcher.began
    if code == OUT_OF_MEMORY:
        return End(code, "oom", "an allocation failed: out of memory", peak, began)
    if code < 0:
        name = signal.Signals(-code).name
        return End(code, "killed", f"killed by {name} at {peak:.0f} MB", peak, began)
    return End(code, None, "", peak, began, watcher.said if watcher else "")


def _bounded(output: IO[str] | None) -> Callable[[], None]:
    """A function that cuts a log which has grown too long; its beginning and its end stay."""
    if output is None or not hasattr(output, "fileno"):
        return lambda: None
    output.flush()
    handle = output.fileno()
    # All who write to it share this mode: after a cut they go on at the new end.
    fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) | os.O_APPEND)

    def cut() -> None:
        with contextlib.suppress(OSError):
            if os.fstat(handle).st_size > LOG_MOST:
                os.ftruncate(handle, LOG_KEPT)
                os.write(handle, b"\n[the log grew too long; what stood here was cut out]\n")

    return cut


def _kill(child: subprocess.Popen) -> int:
    """Kill a child and its children, if they still run; returns its code."""
    if child.poll() is None:
        for member in psutil.Process(child.pid).children(recursive=True):
            try:
                member.kill()
            except psutil.Error:
                continue
        child.kill()
    return child.wait()


def finish_cell(
    plan: Path,
    cell: str,
    layout: Layout,
    attempt: int,
    retries: int,
    log: IO[str],
) -> int:
    """Run one cell within its limits, doubled by every retry; returns the exit code of the job.

    0: a record was written, of success or of a failure that is a result. 1: try again (a limit was
    met and retries are left), or something outside the method is broken, as the log says.
    The cell's folder is held meanwhile: another run on it waits, and finds the cell made.
    """
    row = read_plan(plan).loc[cell].to_dict()
    check = run_check()
    try:
        kill_orphans()
        with held(cell_folder(row, layout), cell, check=check) as lock:
            return _finish(row, plan, layout, attempt, retries, log, lock, check)
    except BallastError as error:
        print(f"{cell}: {error}", file=log)
        print(f"{cell}: {error}", file=sys.stderr)
        return 1


def run_check() -> Callable[[], None]:
    """What a job does while it waits: it ends leftovers of killed runs, and itself with its run."""
    lives, look = run_lives(), seldom(kill_orphans)

    def check() -> None:
        look()
        if not lives():
            raise Orphaned("the run that started this cell has ended")

    return check


def _finish(
    row: dict[str, Any],
    plan: Path,
    layout: Layout,
    attempt: int,
    retries: int,
    log: IO[str],
    lock: int,
    check: Callable[[], None],
) -> int:
    """`finish_cell` with the cell's folder held. Raises Orphaned and DeviceError."""
    cell = row["id"]
    path = cell_folder(row, layout) / RECORD
    # Snakemake removed the record before this job: one that is there, another run has made since.
    record = _current(row, path)
    if record is not None:
        print(f"{cell}: made by another run", file=sys.stderr)
        return 0
    limits = json.loads(row["spec"])["limits"]
    minutes, memory_mb = limits_at(limits, attempt)
    command = [sys.executable, "-m", "ballast.cell", str(plan), cell]
    command += ["--root", str(layout.root), "--results", str(layout.results)]
    # Its time begins when its GPUs are free.
    with lease(limits["gpus"], cell, check) as gpus:
        end = run_limited(command, 60 * minutes, memory_mb, log, Watcher(cell), lock, gpus)
        if retries == 0 and end.kind == "killed" and -end.code in FROM_OUTSIDE:
            attempt += 1
            line = f"{cell}: {end.reason}; goes on from its last checkpoint, attempt {attempt}"
            print(line, file=log)
            print(line, file=sys.stderr)
            end = run_limited(command, 60 * minutes, memory_mb, log, Watcher(cell), lock, gpus)
    kind, reason = end.kind, end.reason
    if kind is None:
        record = _current(row, path)
        if record is not None:
            print(_summary(record), file=sys.stderr)
            return 0
        if end.said or not end.began or end.code in (BROKEN, UNFLUSHED):
            why = "bad data" if end.code == BROKEN else f"exit code {end.code}"
            print(f"{cell}: {end.said or f'{why}; see {log.name}'}", file=sys.stderr)
            return 1
        # Not a limit that a larger one may mend: recorded at once, as an exception is.
        kind, reason = "raised", f"the process ended with exit code {end.code} and no record"
    print(f"{cell}: {kind}: {reason}, attempt {attempt}", file=log)
    if attempt <= retries and kind != "raised":
        # The retry has a log of its own; on a cluster this line stays in the submission's.
        print(f"{cell}: {kind}: {reason}, attempt {attempt}", file=sys.stderr)
        return 1
    write_record(row, layout, failed_record(row, layout, kind, reason, attempt))
    print(f"{cell}: {kind}: {reason}", file=sys.stderr)
    return 0


def _current(row: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The record of a cell if it is one of this plan."""
    with contextlib.suppress(DataError):
        record = read_path(path)
        return record if status_of(row, record) in ("ok", "failed") else None
    return None


def _summary(record: dict[str, Any]) -> str:
    """One line about a finished cell, for the screen."""
    if record["status"] == "failed":
        return f"{record['id']}: {record['failure']['kind']}: {record['failure']['reason']}"
    target = record["identity"]["target"]
    tasks = [name for name, task in record["tasks"].items() if task["role"] == "target"]
    value, before = (
        fmean(record[block][task]["value"] for task in tasks) for block in ("scores", "base_scores")
    )
    seconds = record["costs"]["seconds"]["total"]
    return f"{record['id']}: {target} {before:.1f} -> {value:.1f}, {seconds:.0f} s"
