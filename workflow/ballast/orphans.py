"""Processes and whose they are: what a run started must not outlive it.

A supervisor marks what it starts by an environment variable, which every descendant inherits,
also one that left its parent. Imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil

MARK = "BALLAST_SUPERVISOR"  # the mark of the supervisor, in every descendant
RUN = "BALLAST_RUN"  # the mark of the Snakemake process, in its jobs
POLL = 0.5  # seconds between looks at those above
SCAN = 5.0  # seconds between looks at all processes of the machine
OOM_SCORE = 500  # of -1000 to 1000: the kernel, out of memory, kills a cell before its supervisor
OOM_FILE, OOM_TEXT = "/proc/self/oom_score_adj", str(OOM_SCORE).encode()
PR_SET_PDEATHSIG, KILL = 1, int(signal.SIGKILL)
# Found here, not by the child: dlopen between fork and exec may wait for a lock of another thread.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def start_of(process: int) -> str:
    """When a process started, in clock ticks since boot: unlike a date, no clock moves it.

    Raises ProcessLookupError if there is no such process.
    """
    try:
        # The name, in parentheses, may hold spaces; 22nd field of all.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, IndexError):
        if sys.platform == "linux":
            raise ProcessLookupError(process) from None
    try:
        return str(psutil.Process(process).create_time())
    except psutil.NoSuchProcess:
        raise ProcessLookupError(process) from None


def mark() -> str:
    """The mark of this process, by which its descendants are known: id, start, and where."""
    return f"{os.getpid()}-{start_of(os.getpid())}-{_namespace()}"


@cache
def _namespace() -> str:
    """Where process ids have this process's meaning: this boot of this machine, this container.

    The first namespace has the same number on every machine, and environments travel to others.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
        return boot + Path("/proc/self/ns/pid").readlink().name.strip("pid:[]")
    except OSError:
        return "0"


def seldom(work: Callable[[], object]) -> Callable[[], None]:
    """A function that does the work when it is first called, then every SCAN seconds at most."""
    last = -SCAN

    def maybe() -> None:
        nonlocal last
        if time.monotonic() - last >= SCAN:
            work()
            last = time.monotonic()

    return maybe


def marked(own: str) -> set[int]:
    """Processes with a mark."""
    return {process for process, text in _marks().items() if text == own}


def _marks() -> dict[int, str]:
    """Marks by process, of this user's processes."""
    found, name = {}, f"{MARK}=".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if entry.stat().st_uid != os.getuid():
                continue
            for word in (entry / "environ").read_bytes().split(b"\0"):
                if word.startswith(name):
                    found[int(entry.name)] = word.removeprefix(name).decode()
    return found


def kill_marked(own: str) -> None:
    """Kill every process with a mark; repeated, as one may start another meanwhile."""
    for _ in range(10):
        members = marked(own)
        if not members:
            return
        for process in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)


def kill_orphans() -> list[int]:
    """Kill this user's processes whose supervisor is gone; returns them."""
    found = []
    for process, text in _marks().items():
        supervisor, start, namespace = text.split("-")
        if namespace != _namespace() or _runs(int(supervisor), start):
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
            found.append(process)
    return found


def _runs(process: int, start: str) -> bool:
    """Whether a process that started then runs, and does not only wait to be reaped."""
    with contextlib.suppress(ProcessLookupError, psutil.Error):
        if start_of(process) == start:
            return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    return False


def ancestors() -> list[psutil.Process]:
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


def alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that nobody has waited for yet is dead all the same."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def announce_run() -> None:
    """Let the jobs that this process starts, a Snakemake, know it as their run."""
    os.environ[RUN] = mark()


def run_lives() -> Callable[[], bool]:
    """A function that says whether the run which started this process still goes on.

    The run may be gone already: its mark tells. Without one those above are watched from now on.
    """
    above = ancestors()
    run, start, namespace = os.environ.get(RUN, "0-0-0").split("-")

    def lives() -> bool:
        known = namespace == _namespace()
        return all(alive(process) for process in above) and (not known or _runs(int(run), start))

    return lives


def end_with_run() -> None:
    """Let this process, a script of Snakemake, end as by SIGKILL when the run above it is gone.

    Whatever it was writing is as safe as from any other kill.
    """
    lives = run_lives()

    def watch() -> None:
        while lives():
            time.sleep(POLL)
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                child.kill()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end-with-run").start()


def tied_to(parent: int) -> Callable[[], None]:
    """For `preexec_fn`: Linux kills the child when its parent dies, and it first if out of memory.

    parent: the process id of the caller.
    """

    def tie() -> None:
        if _PRCTL is None:
            return
        _PRCTL(PR_SET_PDEATHSIG, KILL)
        if os.getppid() != parent:  # it died before the request
            os._exit(1)
        with contextlib.suppress(OSError):
            handle = os.open(OOM_FILE, os.O_WRONLY)
            os.write(handle, OOM_TEXT)
            os.close(handle)

    return tie
