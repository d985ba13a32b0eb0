"""Children that end as no child should, or that do not end: what the supervisor makes of each."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import resource
import subprocess
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import save_file

from ballast import locks, orphans, supervise
from ballast.cell import _out_of_memory
from ballast.costs import since_start
from ballast.damage import set_aside_damaged
from ballast.dates import without_future
from ballast.errors import DataError
from ballast.files import remove_parts, remove_parts_of, replacing, write_sums, write_text
from ballast.layout import Layout
from ballast.locks import held
from ballast.plan import COLUMNS
from ballast.progress import Watcher
from ballast.supervise import End, finish_cell, run_limited


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def gone(process: int, seconds: float = 5) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if psutil.Process(process).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("stopped", "os.kill(os.getpid(), signal.SIGSTOP)"),
        ("deaf", "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"),
        ("mute", "sys.stderr.close(); sys.stdout.close(); os.close(0); time.sleep(60)"),
    ],
)
def test_a_child_that_never_ends_is_ended_in_time(name, body):
    started = time.monotonic()
    end = run_limited(python(f"import os, signal, sys, time\n{body}"), 1.5, 1000)
    assert end.kind == "time", name
    assert time.monotonic() - started < 10


def test_a_segmentation_fault_is_told():
    end = run_limited(python("import ctypes; ctypes.string_at(0)"), 60, 1000)
    assert (end.kind, end.reason[:20]) == ("killed", "killed by SIGSEGV at")


LEAVES = """
    import os, subprocess, sys
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        if {exec}:
            os.execv(sys.executable, [sys.executable, "-c", {body!r}])
        exec({body!r})
    os.wait()
    import time; time.sleep({stay})
"""


@pytest.mark.parametrize("by_exec", [False, True])
def test_a_daemon_that_left_its_family_is_ended_with_it(tmp_path, by_exec):
    path = tmp_path / "pid"
    body = f"import os, time; open({str(path)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    end = run_limited(python(LEAVES.format(exec=by_exec, body=body, stay=2)), 60, 1000)
    assert (end.code, end.kind) == (0, None)
    assert gone(int(path.read_text()))


def test_the_memory_of_a_daemon_counts():
    body = "import time; held = bytearray(400 << 20); held[::4096] = b'x' * len(held[::4096]); "
    code = LEAVES.format(exec=True, body=body + "time.sleep(60)", stay=60)
    end = run_limited(python(code), seconds=60, memory_mb=300)
    assert end.kind == "oom"


def test_a_flooded_log_stays_bounded_and_keeps_both_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "LOG_MOST", 4 << 20)
    monkeypatch.setattr(supervise, "LOG_KEPT", 1 << 10)
    code = """
        import os, time
        print("first", flush=True)
        until = time.monotonic() + 3
        while time.monotonic() < until:
            os.write(1, b"x" * 4096 + b"\\n")
            time.sleep(0.0005)
        print("last", flush=True)
    """
    with (tmp_path / "log").open("w", buffering=1) as log:
        assert run_limited(python(code), 60, 1000, log).code == 0
    text = (tmp_path / "log").read_text()
    assert len(text) < 8 << 20
    assert text.startswith("first\n")
    assert text.endswith("last\n") or "cut out" in text[-200:]
    assert "what stood here was cut out" in text
    assert "\0" not in text


def test_a_supervisor_that_is_killed_leaves_nothing_once_another_looks(tmp_path):
    """The child dies with its supervisor; what the child had started is ended by the next one."""
    path = tmp_path / "pid"
    body = f"import os, time; open({str(path)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    child = textwrap.dedent(LEAVES.format(exec=True, body=body, stay=60))
    program = f"from ballast.supervise import run_limited\nrun_limited({python(child)!r}, 60, 1000)"
    with subprocess.Popen([sys.executable, "-c", program]) as supervisor:
        limit = time.monotonic() + 60
        while not (path.exists() and path.read_text()):
            assert time.monotonic() < limit
            time.sleep(0.05)
        daemon = int(path.read_text())
        assert daemon not in orphans.kill_orphans()
        supervisor.kill()
    assert daemon in orphans.kill_orphans()
    assert gone(daemon)


def test_the_kernel_out_of_memory_takes_the_child_first(tmp_path):
    path = tmp_path / "score"
    code = f"open({str(path)!r}, 'w').write(open('/proc/self/oom_score_adj').read())"
    run_limited(python(code), 60, 1000)
    assert int(path.read_text()) == orphans.OOM_SCORE


ALLOCATIONS = {
    "torch": lambda: torch.ones(1 << 29),
    "numpy": lambda: np.ones(1 << 29),
    "python": lambda: bytearray(1 << 31),
    "map": lambda: __import__("mmap").mmap(-1, 1 << 31),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_an_allocation_that_the_system_refuses_is_known_as_such(name):
    process = os.fork()
    if process == 0:
        size = psutil.Process().memory_info().vms + (200 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        try:
            ALLOCATIONS[name]()
        except BaseException as error:
            os._exit(77 if _out_of_memory(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 77


@pytest.fixture
def finish(tmp_path, monkeypatch):
    """finish(end, retries) -> (exit code, failures recorded) of a cell whose child ended so."""
    limits = {"minutes": 0.5, "memory_mb": 100, "gpus": 0}
    spec = json.dumps({"suite": "s", "limits": limits})
    plan, written = tmp_path / "plan.parquet", []
    pd.DataFrame([{"id": "cell", "spec": spec, "train_key": "t"}]).to_parquet(plan)
    monkeypatch.setattr(supervise, "cell_folder", lambda *_: tmp_path)
    monkeypatch.setattr(supervise, "failed_record", lambda row, layout, *failure: failure)
    monkeypatch.setattr(supervise, "write_record", lambda row, layout, found: written.append(found))

    def finish(end: End, retries: int = 0):
        monkeypatch.setattr(supervise, "run_limited", lambda *_: end)
        log = io.StringIO()
        log.name = "cell.log"
        return finish_cell(plan, "cell", Layout(tmp_path, tmp_path), 1, retries, log), written

    return finish


@pytest.mark.parametrize("code", [0, 1, 5])
def test_an_end_without_a_record_is_a_failure_of_its_own(finish, code):
    reason = f"the process ended with exit code {code} and no record"
    assert finish(End(code, None, "", 1.0, began=True), 2) == (0, [("raised", reason, 1)])


@pytest.mark.parametrize("end", [End(1, None, "", 1.0), End(3, None, "", 1.0, began=True)])
def test_an_end_before_the_work_or_by_bad_data_is_no_result(finish, end):
    assert finish(end) == (1, [])


def test_a_child_says_when_it_began():
    code = "import ballast.progress as p; p.Progress('x'); raise SystemExit(5)"
    assert run_limited(python(code), 60, 1000, watcher=Watcher("x")).began
    assert not run_limited(python("raise SystemExit(5)"), 60, 1000, watcher=Watcher("x")).began


HOLDER = """
import sys, time
from pathlib import Path
from ballast.locks import held
with held(Path(sys.argv[1]), "first"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_who_holds_a_folder_is_waited_for_and_its_death_frees_it(tmp_path):
    said: list[str] = []

    def check() -> None:
        holder.kill()

    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with held(tmp_path, "second", said.append, check):
            assert len(said) == 1
    assert said[0].startswith("second: waiting for another process that works on it, process ")
    assert str(holder.pid) in said[0]


def test_a_lock_lives_as_long_as_the_child_that_has_it(tmp_path):
    with held(tmp_path, "first") as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, pass_fds=(lock,))
    said: list[str] = []
    with held(tmp_path, "second", said.append, child.kill):
        assert said
    child.wait()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: cannot be written to"), held(tmp_path / "file", "x"):
        pass


@pytest.mark.parametrize("library", ["text", "safetensors"])
def test_what_is_being_written_stays_whatever_file_a_library_makes_of_it(tmp_path, library):
    with replacing(tmp_path / "a") as temporary:
        if library == "safetensors":
            save_file({"a": torch.ones(3)}, temporary)
        else:
            temporary.write_text("text")
        remove_parts(tmp_path)
        assert temporary.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_writer_left_is_removed_and_what_is_in_use_stays(tmp_path):
    stale = tmp_path / ".a.txt.stale.part"
    stale.write_text("")
    half = tmp_path / f"{stale.name}.new"
    half.mkdir()
    (half / ".tmp123").write_text("half")
    other = tmp_path / "samples" / ".b.txt.stale.part"
    other.parent.mkdir()
    other.write_text("half")
    with replacing(tmp_path / "a.txt") as temporary:
        assert not stale.exists()
        assert not half.exists()
        remove_parts(tmp_path)
        assert not other.exists()
        assert temporary.exists()
        # A second writer of the same file leaves the first one's alone.
        write_text(tmp_path / "a.txt", "second")
        temporary.write_text("first")
    assert (tmp_path / "a.txt").read_text() == "first"
    assert not list(tmp_path.rglob("*.part*"))


def test_what_a_killed_writer_left_is_removed_over_nfs_too(tmp_path, monkeypatch):
    """There an exclusive lock needs a file that is open for writing (flock(2))."""
    flock = fcntl.flock

    def nfs(file, how):
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if how & fcntl.LOCK_EX and mode == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return flock(file, how)

    monkeypatch.setattr(fcntl, "flock", nfs)
    (tmp_path / ".a.txt.stale.part.new").mkdir()
    (tmp_path / ".a.txt.stale.part").write_text("")
    write_text(tmp_path / "a.txt", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_files_are_as_open_to_others_as_the_user_wants(tmp_path, umask, mode):
    """A group that shares a folder can go on with what another of it has made."""
    before = os.umask(umask)
    try:
        with held(tmp_path, "cell"):
            write_text(tmp_path / "text", "text")
            with replacing(tmp_path / "tensors") as temporary:
                save_file({"a": torch.ones(3)}, temporary)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys((".lock", "text", "tensors"), mode)


def test_tables_that_are_being_written_are_not_taken_for_damaged_ones(tmp_path):
    layout, plan = Layout(tmp_path, tmp_path), pd.DataFrame(columns=[*COLUMNS])
    (tmp_path / "s/tables").mkdir(parents=True)
    table = tmp_path / "s/tables/a.md"
    table.write_text("old")
    write_sums(tmp_path / "s", [table], "tables/.checksums.json")
    table.write_text("new")
    with held(tmp_path / "s", "tables", name=".tables.lock"):
        assert set_aside_damaged(plan, plan, layout, "s") == []
    assert table.read_text() == "new"
    [line] = set_aside_damaged(plan, plan, layout, "s")
    assert "a.md" in line
    assert not table.exists()


def test_seconds_since_the_start_do_not_follow_the_clock(monkeypatch):
    before = since_start()
    assert 0 < before < time.clock_gettime(time.CLOCK_BOOTTIME)
    for jump in (-1e6, 1e6):
        now = time.time
        monkeypatch.setattr(time, "time", lambda now=now, jump=jump: now() + jump)
        assert before <= since_start() < before + 60


def test_dates_in_the_future_become_the_present_in_their_order(tmp_path):
    names = ("cells/a/run.json", "tables/x.md", "cells/b/run.json", "tables/.complete")
    later = time.time() + 1e6
    for number, name in enumerate(names):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (later + number, later + number))
    (tmp_path / "tables/gone.md").symlink_to("removed by another process")
    past = tmp_path / "tables/old.md"
    past.touch()
    os.utime(past, (1, 1))
    assert len(without_future(tmp_path)) == 4
    dates = [(tmp_path / name).stat().st_mtime_ns for name in names]
    assert dates == sorted(dates)
    assert len(set(dates)) == 4
    assert max(dates) <= time.time_ns()
    assert past.stat().st_mtime == 1
    assert without_future(tmp_path) == []


def test_a_file_system_without_locks_is_said_so(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    said: list[str] = []
    with held(tmp_path, "cell", said.append):
        assert "without locks" in said[0]


def test_what_is_whole_is_freed_of_what_its_writer_left_too(tmp_path):
    """A writer that was killed after its file had taken its place."""
    for name in ("a.json", "b.json"):
        write_text(tmp_path / name, "whole")
        (tmp_path / f".{name}.stale.part").write_text("")
        (tmp_path / f".{name}.stale.part.new").mkdir()
    remove_parts_of(tmp_path / "a.json")
    assert len(list(tmp_path.iterdir())) == 4
    assert not list(tmp_path.glob(".a.*"))
