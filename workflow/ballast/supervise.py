"""Runs a cell as a child process, within limits, and tied to the life of whoever started it.

The supervisor imports no torch: it stays small beside the child, sees its end whatever the cause,
and writes the record that a killed child cannot write.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import IO, Any

import psutil

from ballast.errors import BallastError
from ballast.files import read_json, write_json
from ballast.layout import Layout
from ballast.limits import limits_at
from ballast.outcome import (
    BROKEN,
    OUT_OF_MEMORY,
    RECORD,
    RECORDED,
    cell_folder,
    failed_record,
)
from ballast.plan import read_plan
from ballast.progress import PIPE, Watcher

POLL = 0.5  # seconds between looks at the child


@dataclass(frozen=True)
class End:
    """How a child ended: kind is None if it finished by itself, else oom, time or killed."""

    code: int
    kind: str | None
    reason: str
    peak_mb: float


class Orphaned(BallastError):
    """The process that started the supervisor is gone."""


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies; runs in the child before exec."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _ancestors() -> list[psutil.Process]:
    """The processes above this one up to the first Snakemake, or the direct parent alone."""
    found: list[psutil.Process] = []
    for process in psutil.Process().parents():
        found.append(process)
        try:
            # The program itself: a shell that runs .snakemake/scripts/... only names it.
            if "snakemake" in [Path(word).name for word in process.cmdline()[:3]]:
                return found
        except psutil.Error:
            break
    return found[:1]


def _alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that nobody has waited for yet is dead all the same."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _resident_mb(process: psutil.Process) -> float:
    """Resident memory of a process and its children, MiB."""
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_info().rss
        except psutil.Error:
            continue
    return total / 2**20


def run_limited(
    command: list[str],
    seconds: float,
    memory_mb: float,
    output: IO[str] | None = None,
    watcher: Watcher | None = None,
) -> End:
    """Run a command to its end or to a limit; its output goes to `output` (None: inherited).

    seconds: wall time; memory_mb: resident memory of the child and its children, MiB.
    Raises Orphaned, with the child killed, if the process that started this one has died.
    """
    ancestors, started, peak = _ancestors(), time.monotonic(), 0.0
    pipe = {PIPE: str(watcher.write)} if watcher else {}
    child = subprocess.Popen(
        command,
        stdout=output,
        stderr=output,
        stdin=subprocess.DEVNULL,
        preexec_fn=_die_with_parent,
        pass_fds=(watcher.write,) if watcher else (),
        env=os.environ | pipe,
    )
    watched = psutil.Process(child.pid)
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
            try:
                peak = max(peak, _resident_mb(watched))
            except psutil.Error:
                continue
            if peak > memory_mb:
                reason = f"used {peak:.0f} MiB, limit {memory_mb:.0f} MiB"
                return End(_kill(child), "oom", reason, peak)
            if time.monotonic() - started > seconds:
                reason = f"not finished after {seconds / 60:.3g} minutes, the limit"
                return End(_kill(child), "time", reason, peak)
            if not all(_alive(process) for process in ancestors):
                raise Orphaned("the run that started this cell has ended")
    finally:
        _kill(child)
        signal.signal(signal.SIGTERM, handler)
        if watcher:
            watcher.close()
    if code == OUT_OF_MEMORY:
        return End(code, "oom", "an allocation failed: out of memory", peak)
    if code < 0:
        name = signal.Signals(-code).name
        return End(code, "killed", f"killed by {name} at {peak:.0f} MiB", peak)
    return End(code, None, "", peak)


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
    """
    row = read_plan(plan).loc[cell].to_dict()
    minutes, memory_mb = limits_at(json.loads(row["spec"])["limits"], attempt)
    command = [sys.executable, "-m", "ballast.cell", str(plan), cell]
    command += ["--root", str(layout.root), "--results", str(layout.results)]
    try:
        end = run_limited(command, 60 * minutes, memory_mb, log, Watcher(cell))
    except Orphaned as error:
        print(f"{cell}: {error}", file=log)
        return 1
    if end.kind is None:
        if end.code == RECORDED:
            print(_summary(read_json(cell_folder(row, layout) / RECORD)), file=sys.stderr)
            return 0
        why = "bad data" if end.code == BROKEN else f"exit code {end.code}"
        print(f"{cell}: {why}; see {log.name}", file=sys.stderr)
        return 1
    print(f"{cell}: {end.kind}: {end.reason}, attempt {attempt}", file=log)
    if attempt <= retries:
        return 1
    record = failed_record(row, layout, end.kind, end.reason, attempt)
    write_json(cell_folder(row, layout) / RECORD, record)
    print(f"{cell}: {end.kind}: {end.reason}", file=sys.stderr)
    return 0


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
