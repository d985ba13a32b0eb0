"""GPUs of this machine, each lent to one cell at a time.

Snakemake starts as many cells as there are cores and sets no CUDA_VISIBLE_DEVICES: without leases
all of them would train on the first GPU. A lease is an abstract Unix socket with the device's name
(see unix(7)): one process of the machine can bind it, whoever its user is, and the kernel frees it
when the last process that holds it dies, however it dies; no file stays behind. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from ballast.driver import nvidia_smi
from ballast.errors import BallastError

VISIBLE = "CUDA_VISIBLE_DEVICES"
SHARED_BY = "BALLAST_CELLS_PER_GPU"  # how many cells may use one GPU at a time; 1 if not set
LOCK = "ballast-gpu"  # how the names of all locks begin
DRIVER = Path("/proc/driver/nvidia/gpus")
PATIENCE = 5.0  # seconds of waiting before it is said
# What CUDA accepts: it stops reading at the first entry that is none of these.
ENTRY = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")


class DeviceError(BallastError):
    """GPUs that are asked for and cannot be had."""


@dataclass(frozen=True)
class Lease:
    """What a child needs to use its GPUs, and none but them.

    environment: changes of its environment; files: file descriptors that keep the GPUs lent, for
    `pass_fds`, so that they are free again only when the child is gone too.
    """

    environment: dict[str, str] = field(default_factory=dict)
    files: tuple[int, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """A GPU that the driver lists, with the parts that it is divided into (MIG), if it is."""

    uuid: str
    parts: tuple[str, ...] = ()


@contextlib.contextmanager
def lease(count: int, label: str, check: Callable[[], None] = lambda: None) -> Iterator[Lease]:
    """Lend `count` GPUs that no other lease of this machine holds; waits until there are as many.

    With 0 the child sees no GPU. With 1 on a machine without one (or where no NVIDIA driver can be
    asked) nothing is lent: `device: auto` then takes what torch finds. `check` is called while
    waiting and may raise. Raises DeviceError if more are asked for than this process may use.
    """
    devices = visible_devices() if count else {}
    if count == 1 and devices is None:
        yield Lease()
        return
    devices = devices or {}
    if count > max(1, len(devices)):
        named = os.environ.get(VISIBLE)
        source = "the NVIDIA driver's list" if named is None else f"{VISIBLE}={named!r}"
        raise DeviceError(
            f"limits.gpus asks for {count} GPUs, and {source} has {len(devices)}; ask for fewer, "
            "or run where there are as many"
        )
    taken = _wait(count, devices, label, check) if devices else {}
    try:
        yield Lease({VISIBLE: ",".join(taken)}, tuple(one.fileno() for one in taken.values()))
    finally:
        for one in taken.values():
            one.close()


def visible_devices() -> dict[str, str] | None:
    """The GPUs that this process may use: {as CUDA_VISIBLE_DEVICES names it: name of its lock}.

    A lock's name is the UUID, however the device is named to this process. None where neither that
    variable nor an NVIDIA driver says which devices there are.
    """
    named = os.environ.get(VISIBLE)
    if named is None:
        gpus = driver_gpus()
        return None if gpus is None else {x: x for gpu in gpus for x in gpu.parts or (gpu.uuid,)}
    words = takewhile(ENTRY.fullmatch, (word.strip() for word in named.split(",")))
    devices = list(dict.fromkeys(words))
    job = os.environ.get("SLURM_JOB_ID")
    if job:
        # SLURM keeps jobs apart by itself, and each may call its own devices 0, 1, ...
        return {device: f"slurm-{job}.{device}" for device in devices}
    gpus = (driver_gpus() or []) if devices else []
    return {device: _identity(device, gpus) for device in devices}


def _identity(device: str, gpus: list[Gpu]) -> str:
    """The UUID of a device that is named by its index or by the beginning of its UUID."""
    if device.isdigit():
        fitting = gpus[int(device) : int(device) + 1]
    else:
        fitting = [gpu for gpu in gpus if gpu.uuid.startswith(device)]
    if len(fitting) != 1:
        return device
    # Of a GPU in parts CUDA uses the first.
    return fitting[0].parts[0] if fitting[0].parts else fitting[0].uuid


def driver_gpus() -> list[Gpu] | None:
    """The GPUs that the NVIDIA driver lists, in its order; None if it cannot be asked.

    A driver that hangs is given up (`driver.nvidia_smi`).
    """
    listed = nvidia_smi("-L")
    if listed is not None and listed.startswith("GPU "):
        blocks = re.split(r"^(?=GPU )", listed, flags=re.M)[1:]
        return [_gpu(index, block) for index, block in enumerate(blocks)]
    try:
        texts = [(one / "information").read_text() for one in sorted(DRIVER.iterdir())]
    except OSError:
        return None
    found = [re.search(r"GPU-[0-9a-f-]{36}", text) for text in texts]
    return [Gpu(uuid[0] if uuid else str(i)) for i, uuid in enumerate(found)]


def _gpu(index: int, block: str) -> Gpu:
    """A GPU from its lines of `nvidia-smi -L`: its own, and one for each of its parts."""
    uuid, *parts = re.findall(r"\(UUID: ([\w/-]+)\)", block) or [str(index)]
    return Gpu(uuid, tuple(parts))


def _wait(
    count: int, devices: dict[str, str], label: str, check: Callable[[], None]
) -> dict[str, socket.socket]:
    """Take `count` of the devices as soon as as many are free; all of them or none."""
    started, told = time.monotonic(), False
    while not (taken := _take(count, devices)):
        check()
        if not told and time.monotonic() - started > PATIENCE:
            print(f"{label}: waits for a GPU; in use: {', '.join(devices)}", file=sys.stderr)
            told = True
        # Random, so that two that want several do not take turns in holding one each.
        time.sleep(random.SystemRandom().uniform(0.1, 0.5))
    return taken


def _take(count: int, devices: dict[str, str]) -> dict[str, socket.socket]:
    """Bind the sockets of `count` devices, the least shared first; of none if too few."""
    taken: dict[str, socket.socket] = {}
    for slot in range(cells_per_gpu()):
        for device, name in devices.items():
            if device in taken or len(taken) == count:
                continue
            one = socket.socket(socket.AF_UNIX)
            try:
                one.bind(f"\0{LOCK}.{name}.{slot}")
            except OSError as error:
                one.close()
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                taken[device] = one
    if len(taken) < count:
        for one in taken.values():
            one.close()
        return {}
    return taken


def cells_per_gpu() -> int:
    """How many cells may share a GPU. Raises DeviceError for what is no number."""
    text = os.environ.get(SHARED_BY, "1")
    if not re.fullmatch("[1-9][0-9]?", text):
        raise DeviceError(f"{SHARED_BY}={text}: allowed is a number from 1 to 99")
    return int(text)
