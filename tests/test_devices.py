"""GPUs: lent to one cell at a time, free when it is gone, and a driver that hangs hangs no run."""

from __future__ import annotations

import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
import types

import pytest

from ballast import devices
from ballast import driver as driver_module
from ballast.devices import DeviceError, Gpu, driver_gpus, lease, visible_devices
from ballast.forecast.machine import this_machine
from ballast.supervise import run_limited

A, B, C = (f"GPU-{letter * 8}-1111-2222-3333-{letter * 12}" for letter in "abc")
PART = "MIG-{}-4444-5555-6666-777777777777"
LISTED = f"GPU 0: NVIDIA H200 (UUID: {A})\nGPU 1: NVIDIA H200 (UUID: {B})\n"
DIVIDED = (
    f"GPU 0: NVIDIA H200 (UUID: {A})\n"
    f"  MIG 3g.71gb     Device  0: (UUID: {PART.format('1' * 8)})\n"
    f"  MIG 3g.71gb     Device  1: (UUID: {PART.format('2' * 8)})\n"
    f"GPU 1: NVIDIA H200 (UUID: {B})\n"
)
OTHER_USER = 65534


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine without GPUs; its locks are no one else's."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "BALLAST_CELLS_PER_GPU"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "driver")
    monkeypatch.setattr(devices, "LOCK", f"ballast-test-{os.getpid()}")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


@pytest.fixture
def driver(tmp_path):
    """driver(shell text) -> an nvidia-smi that does this."""

    def make(body: str) -> None:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)

    return make


def lists(text: str) -> str:
    return f"cat <<'END'\n{text}END"


HEAD = "from ballast import devices\ndevices.LOCK = '{}'\n"


def in_other_process(code: str, **options) -> subprocess.Popen:
    """Python with leases of its own, of the same locks."""
    return subprocess.Popen(
        [sys.executable, "-c", HEAD.format(devices.LOCK) + textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


HOLD = """
    import time
    with devices.lease(1, "elsewhere") as gpus:
        print(gpus.environment["CUDA_VISIBLE_DEVICES"], flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize(
    ("value", "visible"),
    [
        ("0,1", ["0", "1"]),
        (" 2 , 0 ", ["2", "0"]),
        ("0,2,-1,1", ["0", "2"]),  # CUDA's own example: it stops at what is not valid
        ("0,0", ["0"]),
        (f"{A},{B}", [A, B]),
        (PART.format("1" * 8), [PART.format("1" * 8)]),
        (f"MIG-{A}/1/0", [f"MIG-{A}/1/0"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),  # what SLURM may say to a job without GPUs
    ],
)
def test_the_variable_is_read_as_cuda_reads_it(monkeypatch, value, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert list(visible_devices()) == visible


def test_without_the_variable_the_driver_says_what_there_is(driver):
    driver(lists(LISTED))
    assert list(visible_devices()) == [A, B]
    driver(lists(DIVIDED))
    assert list(visible_devices()) == [PART.format("1" * 8), PART.format("2" * 8), B]


@pytest.mark.parametrize("broken", ["exit 9", "echo 'No devices were found'", "kill -9 $$", None])
def test_where_nvidia_smi_is_of_no_use_the_kernels_list_is_read(driver, broken):
    if broken:
        driver(broken)
    assert driver_gpus() is None
    for i, uuid in enumerate([B, A]):
        folder = devices.DRIVER / f"0000:0{i}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t NVIDIA H200\nGPU UUID: \t {uuid}\n")
    assert driver_gpus() == [Gpu(B), Gpu(A)]


def test_an_nvidia_smi_that_hangs_is_given_up(driver, monkeypatch):
    driver("trap '' TERM; exec sleep 60")
    monkeypatch.setattr(driver_module, "SECONDS", 0.3)
    started = time.monotonic()
    with lease(1, "cell") as gpus:
        assert gpus.environment == {}
    assert time.monotonic() - started < 3


def test_a_hanging_driver_does_not_stop_a_run_at_its_start(driver, monkeypatch):
    """Not even one that survives SIGKILL, as a process inside a hung driver does."""
    driver("trap '' TERM; exec sleep 60")
    monkeypatch.setattr(driver_module, "SECONDS", 0.3)
    killed = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda child: killed.append(child))
    started = time.monotonic()
    found = this_machine()
    assert time.monotonic() - started < 3
    assert (found.gpus, found.gpu_memory_mb) == (0, None)
    (child,) = killed
    monkeypatch.undo()
    child.kill()
    child.wait()


def test_the_machine_has_the_gpus_that_the_driver_lists(driver):
    driver(f"echo '0, {A}, NVIDIA H200, 143771'; echo '1, {B}, NVIDIA H200, 143771'")
    found = this_machine()
    assert (found.gpus, found.gpu_name) == (2, "NVIDIA H200")
    assert found.gpu_memory_mb == pytest.approx(143771 * 1.048576)


def test_no_gpu_asked_for_hides_all_of_them(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with lease(0, "cell") as gpus:
        assert gpus.environment == {"CUDA_VISIBLE_DEVICES": ""}
        assert gpus.files == ()


def test_one_gpu_where_there_is_none_is_torchs_to_find():
    with lease(1, "cell") as gpus:
        assert gpus.environment == {}


def test_one_gpu_where_all_are_hidden_is_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with lease(1, "cell") as gpus:
        assert gpus.environment == {"CUDA_VISIBLE_DEVICES": ""}


def test_more_gpus_than_there_are_is_one_sentence(monkeypatch, driver):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    said = "limits.gpus asks for 2 GPUs, and CUDA_VISIBLE_DEVICES='0' has 1; ask for fewer"
    with pytest.raises(DeviceError, match=said), lease(2, "cell"):
        pass
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    driver(lists(LISTED))
    with pytest.raises(DeviceError, match="the NVIDIA driver's list has 2"), lease(3, "cell"):
        pass


def test_leases_of_one_machine_differ_until_they_end(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    with lease(1, "a") as one, lease(2, "b") as two:
        assert one.environment == {"CUDA_VISIBLE_DEVICES": "0"}
        assert two.environment == {"CUDA_VISIBLE_DEVICES": "1,2"}
    with lease(1, "c") as again:
        assert again.environment == {"CUDA_VISIBLE_DEVICES": "0"}


class Stop(Exception):
    pass


def stop() -> None:
    raise Stop


def test_several_are_taken_all_or_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with lease(1, "a"):
        with pytest.raises(Stop), lease(2, "b", stop):
            pass
        with lease(1, "c") as left:
            assert left.environment == {"CUDA_VISIBLE_DEVICES": "1"}


def test_waiting_is_said_once_and_ends_when_the_check_says_so(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(devices, "PATIENCE", 0.2)
    looks = []

    def check() -> None:
        looks.append(1)
        if len(looks) == 6:
            raise Stop

    with lease(1, "a"), pytest.raises(Stop), lease(1, "b", check):
        pass
    assert capsys.readouterr().err == "b: waits for a GPU; in use: 0\n"


def test_a_gpu_may_be_shared_and_the_least_shared_is_taken(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("BALLAST_CELLS_PER_GPU", "2")
    with lease(1, "a") as a, lease(1, "b") as b, lease(1, "c") as c, lease(1, "d") as d:
        taken = [one.environment["CUDA_VISIBLE_DEVICES"] for one in (a, b, c, d)]
        with pytest.raises(Stop), lease(1, "e", stop):
            pass
    assert taken == ["0", "1", "0", "1"]
    for wrong in ("0", "two"):
        monkeypatch.setenv("BALLAST_CELLS_PER_GPU", wrong)
        with pytest.raises(DeviceError, match=f"BALLAST_CELLS_PER_GPU={wrong}: allowed"):
            lease(1, "a").__enter__()


@pytest.mark.parametrize("name", ["0", A, A[:12]])
def test_a_device_has_one_lock_by_whatever_name_it_is_called(monkeypatch, driver, name):
    driver(lists(LISTED))
    with lease(1, "by the driver's list") as first:
        assert first.environment == {"CUDA_VISIBLE_DEVICES": A}
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
        with pytest.raises(Stop), lease(1, "cell", stop):
            pass


def test_the_index_of_a_divided_gpu_is_its_first_part(monkeypatch, driver):
    driver(lists(DIVIDED))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert visible_devices() == {"0": PART.format("1" * 8), "1": B}


def test_jobs_of_slurm_do_not_wait_for_one_another(monkeypatch):
    """Where SLURM confines its jobs each calls its own GPU 0."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with lease(1, "a"):
        with pytest.raises(Stop), lease(1, "of the same job", stop):
            pass
        monkeypatch.setenv("SLURM_JOB_ID", "8")
        with lease(1, "of another job", stop) as other:
            assert other.environment == {"CUDA_VISIBLE_DEVICES": "0"}


def test_the_gpu_of_a_killed_holder_is_free_at_once(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with in_other_process(HOLD) as holder:
        assert holder.stdout.readline() == "0\n"
        with pytest.raises(Stop), lease(1, "cell", stop):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with lease(1, "cell", stop) as gpus:
            assert gpus.environment == {"CUDA_VISIBLE_DEVICES": "0"}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can run as another user")
def test_another_users_lease_is_seen(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    # The interpreter may lie where the other user cannot look: it changes user when it has started.
    code = f"    import os\n    os.setuid({OTHER_USER})" + HOLD
    with in_other_process(code) as holder:
        assert holder.stdout.readline() == "0\n"
        with pytest.raises(Stop), lease(1, "cell", stop):
            pass
        holder.kill()


def test_the_gpu_is_lent_as_long_as_a_child_lives(monkeypatch):
    """Who leased it is killed, and its child goes on."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    code = """
        import subprocess
        with devices.lease(1, "elsewhere") as gpus:
            child = subprocess.Popen(["sleep", "60"], pass_fds=gpus.files)
            print(child.pid, flush=True)
            child.wait()
    """
    with in_other_process(code) as supervisor:
        child = int(supervisor.stdout.readline())
        supervisor.kill()
        supervisor.wait()
        with pytest.raises(Stop), lease(1, "cell", stop):
            pass
        os.kill(child, signal.SIGKILL)
        limit = time.monotonic() + 5
        with lease(1, "cell", lambda: stop() if time.monotonic() > limit else None) as gpus:
            assert gpus.environment == {"CUDA_VISIBLE_DEVICES": "0"}


CELL = """
import json, os, sys, time
from pathlib import Path
began = time.monotonic()
time.sleep(2)
Path(sys.argv[1]).write_text(json.dumps(
    [os.environ["CUDA_VISIBLE_DEVICES"], began, time.monotonic()]
))
"""
SUPERVISOR = """
    import sys
    from ballast.supervise import run_limited
    with devices.lease(1, sys.argv[1]) as gpus:
        print(run_limited([sys.executable, *sys.argv[2:]], 6, 1000, gpus=gpus).kind)
"""


def test_cells_beside_one_another_never_share_a_gpu_and_all_finish(monkeypatch, tmp_path):
    """Five on two GPUs; none may take 6 s, and the last would, if waiting counted."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (tmp_path / "cell.py").write_text(CELL)
    program = HEAD.format(devices.LOCK) + textwrap.dedent(SUPERVISOR)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(i), tmp_path / "cell.py", tmp_path / f"{i}.json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(5)
    ]
    assert [one.communicate(timeout=60)[0] for one in started] == ["None\n"] * 5
    times = {"0": [], "1": []}
    for i in range(5):
        device, *span = json.loads((tmp_path / f"{i}.json").read_text())
        times[device].append(span)
    for spans in times.values():
        assert len(spans) >= 2
        spans.sort()
        for (_, end), (begin, _) in itertools.pairwise(spans):
            assert end <= begin


def test_the_child_of_a_supervisor_sees_its_gpus_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    path = tmp_path / "seen"
    code = f"""
        import os, socket
        held = socket.socket(fileno=%d).getsockname().decode()
        open({str(path)!r}, "w").write(os.environ["CUDA_VISIBLE_DEVICES"] + held)
    """
    with lease(1, "a"), lease(1, "b") as gpus:
        code = textwrap.dedent(code) % gpus.files
        run_limited([sys.executable, "-c", code], 60, 1000, gpus=gpus)
    assert path.read_text() == f"5\0{devices.LOCK}.5.0"


def test_leasing_imports_no_torch():
    code = "import sys, ballast.devices; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_record_names_the_gpu_and_how_many_cells_might_share_it(monkeypatch, tmp_path):
    import torch

    from ballast.provenance import provenance

    asked = []

    def properties(device):
        asked.append(device)
        return types.SimpleNamespace(name="NVIDIA H200", uuid=A.removeprefix("GPU-"))

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setenv("BALLAST_CELLS_PER_GPU", "3")
    found = provenance(tmp_path, "cuda:0")
    assert (found["device"], found["gpu"]) == ("NVIDIA H200", A.removeprefix("GPU-"))
    assert (found["cells_per_gpu"], asked) == (3, ["cuda:0"])
    found = provenance(tmp_path, "cpu")
    assert (found["device"], found["gpu"], found["cells_per_gpu"]) == ("cpu", None, None)
