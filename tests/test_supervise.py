"""The supervisor: limits, ends, and lives that are tied to one another."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from ballast import orphans, progress, resident, supervise
from ballast.layout import Layout
from ballast.supervise import End, finish_cell, run_limited

ALLOCATE = "import time; held = bytearray(400 << 20); held[::4096] = b'x' * len(held[::4096]); "


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process ends within a while; one that waits to be reaped has ended."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def pid_in(path: Path) -> int:
    """The number that another process writes to a file, once it is there."""
    limit = time.monotonic() + 20
    while time.monotonic() < limit:
        if path.exists() and path.read_text().strip():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path} was not written")


@pytest.mark.parametrize("code", [0, 1, 3, 42])
def test_a_child_that_ends_by_itself_keeps_its_exit_code(code):
    end = run_limited(python(f"raise SystemExit({code})"), seconds=60, memory_mb=1000)
    assert (end.code, end.kind, end.reason) == (code, None, "")


def test_the_output_of_the_child_goes_to_the_log(tmp_path):
    with (tmp_path / "log").open("w") as log:
        run_limited(
            python("import sys; print('out'); print('err', file=sys.stderr)"), 60, 1000, log
        )
    assert sorted((tmp_path / "log").read_text().split()) == ["err", "out"]


def test_the_exit_code_for_a_failed_allocation_is_out_of_memory():
    end = run_limited(python("raise SystemExit(77)"), seconds=60, memory_mb=1000)
    assert end.kind == "oom"


def test_a_child_over_its_time_is_killed(tmp_path):
    path = tmp_path / "pid"
    code = f"import os, time; open({str(path)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    started = time.monotonic()
    end = run_limited(python(code), seconds=1.5, memory_mb=1000)
    assert time.monotonic() - started < 10
    assert (end.kind, end.reason) == ("time", "not finished after 0.025 minutes, the limit")
    assert gone(pid_in(path))


def test_a_child_over_its_memory_is_killed():
    end = run_limited(python(ALLOCATE + "time.sleep(60)"), seconds=60, memory_mb=200)
    assert end.kind == "oom"
    assert end.peak_mb > 200
    assert end.reason == f"used {end.peak_mb:.0f} MB, limit 200 MB"


def test_the_memory_of_grandchildren_counts_and_they_are_killed_too(tmp_path):
    path = tmp_path / "pid"
    grandchild = f"import os; open({str(path)!r}, 'w').write(str(os.getpid())); {ALLOCATE}"
    code = f"""
        import subprocess, sys
        subprocess.run([sys.executable, "-c", {grandchild + "time.sleep(60)"!r}])
    """
    end = run_limited(python(code), seconds=60, memory_mb=300)
    assert end.kind == "oom"
    assert gone(pid_in(path))


def test_memory_within_the_limit_is_left_alone_and_measured():
    end = run_limited(python(ALLOCATE + "time.sleep(1)"), seconds=60, memory_mb=2000)
    assert end.kind is None
    assert 390 < end.peak_mb < 600


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A checkpoint of 900 MB."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file({f"w{i}": torch.ones(25_000_000) for i in range(9)}, path)
    yield path
    path.unlink()


READ = """
    import sys, time, torch
    from safetensors import safe_open
    with safe_open({path!r}, framework="pt") as stored:
        kept = [stored.get_tensor(name){then} for name in stored.keys()]
        assert sum(float(one.sum()) for one in kept) == 225_000_000
        import psutil
        assert psutil.Process().memory_info().rss > 900e6  # all of it is resident
        time.sleep(2)
"""


def test_a_mapped_checkpoint_larger_than_the_limit_does_not_end_a_cell(weights):
    end = run_limited(python(READ.format(path=str(weights), then="")), 100, memory_mb=800)
    assert (end.code, end.kind) == (0, None)
    assert end.peak_mb < 800


def test_as_much_memory_of_its_own_does(weights):
    end = run_limited(python(READ.format(path=str(weights), then=".clone()")), 100, memory_mb=800)
    assert end.kind == "oom"
    assert end.reason.endswith("MB, limit 800 MB")


def test_shared_memory_is_a_cells_own():
    code = """
        import mmap, time
        held = mmap.mmap(-1, 300_000_000)
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(60)
    """
    assert run_limited(python(code), 60, memory_mb=200).kind == "oom"


def test_memory_is_counted_in_the_unit_of_the_limits():
    code = "import time; held = b'x' * 200_000_000; print(flush=True); time.sleep(60)"
    with subprocess.Popen(python(code), stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert 200 < resident.held_mb(child.pid) < 220
        # A system that does not tell a process's own memory from its files.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resident, "COUNTED", re.compile(rb"^no such line (\d+)$"))
            whole = psutil.Process(child.pid).memory_info().rss / 1e6
            assert resident.held_mb(child.pid) == pytest.approx(whole, rel=0.01)
        child.kill()
    with pytest.raises(psutil.NoSuchProcess):
        resident.held_mb(child.pid)


def test_all_processes_of_the_machine_are_looked_through_only_now_and_then(monkeypatch):
    looks = []

    def look(mark: str) -> set[int]:
        looks.append(mark)
        return set()

    monkeypatch.setattr(resident, "marked", look)
    monkeypatch.setattr(supervise, "POLL", 0.05)
    run_limited(python("import time; time.sleep(1.5)"), seconds=60, memory_mb=1000)
    assert len(looks) == 1
    monkeypatch.setattr(orphans, "SCAN", 0.5)
    run_limited(python("import time; time.sleep(1.8)"), seconds=60, memory_mb=1000)
    assert 3 <= len(looks) <= 6


def test_a_job_that_waits_looks_for_orphans_only_now_and_then(monkeypatch):
    looks = []
    monkeypatch.setattr(supervise, "kill_orphans", lambda: looks.append(time.monotonic()))
    check = supervise.run_check()
    for _ in range(20):
        check()
    assert len(looks) == 1
    monkeypatch.setattr(orphans, "SCAN", 0.1)
    time.sleep(0.15)
    check()
    assert len(looks) == 2


def test_between_fork_and_exec_nothing_is_loaded_or_opened_as_text(monkeypatch):
    """Another thread may hold a lock of the loader, which nobody would release in the child."""

    def refuse(*_, **__):
        os._exit(99)

    tie = orphans.tied_to(os.getpid())
    for owner, name in ((orphans.ctypes, "CDLL"), (Path, "write_text"), (Path, "open")):
        monkeypatch.setattr(owner, name, refuse)
    code = "print(open('/proc/self/oom_score_adj').read())"
    child = subprocess.Popen(python(code), stdout=subprocess.PIPE, preexec_fn=tie)
    assert int(child.communicate()[0]) == orphans.OOM_SCORE
    assert child.returncode == 0


@pytest.mark.parametrize("obstacle", ["file", "folders"])
def test_where_no_line_of_the_terminal_can_be_taken_the_training_goes_on(
    tmp_path, monkeypatch, obstacle
):
    """The folder in /tmp may be another user's, or on a full disk."""
    folder = tmp_path / f"ballast-{os.getuid()}"
    if obstacle == "file":
        folder.write_text("not a folder")
    else:
        (folder / "bar0").mkdir(parents=True)
    monkeypatch.setattr(progress.tempfile, "gettempdir", lambda: str(tmp_path))
    watcher = progress.Watcher("cell")
    watcher.shown = True
    os.write(watcher.write, b"began\n1 10 2.5\n")
    watcher.look()
    assert watcher.began
    assert (watcher.bar.n, watcher.position, watcher.slot) == (1, 0, None)
    watcher.close()


def test_a_child_killed_from_outside_says_by_what():
    def sleepers() -> list[psutil.Process]:
        # Other tests of this process may have left a child, such as a fork server.
        return [p for p in psutil.Process().children() if "time.sleep(60)" in " ".join(p.cmdline())]

    def kill() -> None:
        while not sleepers():
            time.sleep(0.01)
        time.sleep(0.5)
        sleepers()[0].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    end = run_limited(python("import time; time.sleep(60)"), seconds=60, memory_mb=1000)
    killer.join()
    assert end.kind == "killed"
    assert end.reason.startswith("killed by SIGKILL at ")


def test_the_handler_of_sigterm_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    run_limited(python("pass"), seconds=60, memory_mb=1000)
    assert signal.getsignal(signal.SIGTERM) == before


SUPERVISOR = """
import sys
from ballast.supervise import Orphaned, run_limited
child = "import os, time; open({child!r}, 'w').write(str(os.getpid())); time.sleep(120)"
open({own!r}, "w").write(str(__import__("os").getpid()))
try:
    run_limited([sys.executable, "-c", child], 120, 1000)
except Orphaned as error:
    open({said!r}, "w").write(str(error))
"""


@pytest.fixture
def family(tmp_path):
    """Text of a supervisor's program, and the files in which it leaves what it knows."""
    files = {name: tmp_path / name for name in ("own", "child", "said")}
    program = tmp_path / "supervisor.py"
    program.write_text(SUPERVISOR.format(**{name: str(path) for name, path in files.items()}))
    yield program, files
    for name in ("own", "child"):
        if files[name].exists() and files[name].read_text():
            try:
                psutil.Process(int(files[name].read_text())).kill()
            except psutil.NoSuchProcess:
                continue


def test_the_child_dies_when_its_supervisor_is_killed(family):
    program, files = family
    with subprocess.Popen([sys.executable, str(program)]) as supervisor:
        child = pid_in(files["child"])
        supervisor.kill()
    assert gone(child)


def test_a_sigterm_to_the_supervisor_ends_the_child(family):
    program, files = family
    with subprocess.Popen([sys.executable, str(program)]) as supervisor:
        child = pid_in(files["child"])
        supervisor.terminate()
        assert supervisor.wait(10) == 143
    assert gone(child)


@pytest.mark.parametrize("reaped", [True, False])
def test_the_supervisor_ends_when_the_snakemake_above_it_dies(family, tmp_path, reaped):
    """Between the two stands a shell, as Snakemake puts one, which does not die with Snakemake."""
    program, files = family
    scripts = tmp_path / ".snakemake" / "scripts"
    scripts.mkdir(parents=True)
    moved = program.rename(scripts / "tmp.cell.py")
    above = tmp_path / "snakemake"
    shell = f"true; {sys.executable} {moved}; true"
    above.write_text(f"import subprocess; subprocess.run(['bash', '-c', {shell!r}])")
    with subprocess.Popen([sys.executable, str(above)]) as snakemake:
        child, own = pid_in(files["child"]), pid_in(files["own"])
        assert psutil.Process(own).parent().name() == "bash"
        os.kill(snakemake.pid, signal.SIGKILL)
        if reaped:
            snakemake.wait()
        assert gone(own)
        assert gone(child)
    assert files["said"].read_text() == "the run that started this cell has ended"


@pytest.fixture
def cell(tmp_path):
    """finish(end or ends, attempt, retries) -> (exit code, limits given, what was recorded)."""
    row = {
        "id": "cell",
        "spec": json.dumps({"suite": "s", "limits": {"minutes": 0.5, "memory_mb": 100, "gpus": 0}}),
        "train_key": "t",
    }
    plan = tmp_path / "plan.parquet"
    pd.DataFrame([row]).to_parquet(plan)

    def finish(monkeypatch, end: End | list[End], attempt: int, retries: int):
        given, written = {}, []
        ends = end if isinstance(end, list) else [end]

        def run(command, seconds, memory_mb, *_):
            given.update(seconds=seconds, memory_mb=memory_mb)
            return ends.pop(0)

        monkeypatch.setattr(supervise, "run_limited", run)
        monkeypatch.setattr(supervise, "cell_folder", lambda *_: tmp_path)
        monkeypatch.setattr(
            supervise,
            "failed_record",
            lambda row, layout, kind, reason, attempts: written.append((kind, reason, attempts)),
        )
        monkeypatch.setattr(supervise, "write_record", lambda *_: None)
        log = io.StringIO()
        log.name = "cell.log"
        code = finish_cell(plan, "cell", Layout(tmp_path, tmp_path), attempt, retries, log)
        assert not ends
        return code, given, written

    return finish


@pytest.mark.parametrize("kind", ["oom", "time", "killed"])
def test_a_limit_is_tried_again_and_recorded_when_retries_are_spent(cell, monkeypatch, kind):
    end = End(-9, kind, "why", 1.0)
    assert cell(monkeypatch, end, 1, 2) == (1, {"seconds": 30, "memory_mb": 100}, [])
    assert cell(monkeypatch, end, 2, 2) == (1, {"seconds": 60, "memory_mb": 200}, [])
    code, given, written = cell(monkeypatch, end, 3, 2)
    assert (code, given) == (0, {"seconds": 120, "memory_mb": 400})
    assert written == [(kind, "why", 3)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_kill_from_outside_is_not_held_against_the_method_at_once(cell, monkeypatch, number):
    """Where nothing else tries again; a second one is."""

    def killed(times: int) -> list[End]:
        return [End(-number, "killed", "why", 1.0)] * times

    said = End(1, None, "", 1.0, True, "the disk is full")
    assert cell(monkeypatch, [*killed(1), said], 1, 0)[::2] == (1, [])
    assert cell(monkeypatch, killed(2), 1, 0)[::2] == (0, [("killed", "why", 2)])
    # With retries left to Snakemake, it is not tried again here.
    assert cell(monkeypatch, killed(1), 1, 2)[::2] == (1, [])
    assert cell(monkeypatch, killed(1), 3, 2)[::2] == (0, [("killed", "why", 3)])


def test_a_crash_is_held_against_the_method_at_once(cell, monkeypatch):
    end = End(-signal.SIGSEGV, "killed", "why", 1.0)
    assert cell(monkeypatch, [end], 1, 0)[::2] == (0, [("killed", "why", 1)])


@pytest.mark.parametrize(("code", "said"), [(3, "bad data"), (1, "exit code 1")])
def test_what_is_not_the_cells_own_fault_is_not_recorded(cell, monkeypatch, capsys, code, said):
    assert cell(monkeypatch, End(code, None, "", 1.0), 1, 0)[::2] == (1, [])
    assert capsys.readouterr().err == f"cell: {said}; see cell.log\n"


def test_the_supervisor_imports_no_torch():
    code = "import sys, ballast.supervise; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
