"""Measured costs: seconds and memory high-water marks by phase, and the process's own age."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from ballast.orphans import start_of


def since_start() -> float:
    """Seconds since this process was started, imports included, whatever is done to the clock.

    Where the system tells no start by a clock of its own (not Linux): by the date, never negative.
    """
    try:
        ticks = int(start_of(os.getpid())) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks
    except (AttributeError, ValueError, OSError):
        return max(0.0, time.time() - psutil.Process().create_time())


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # Not Linux, or not allowed: the mark then stands for the whole process up to here.
        return


def _peak_mb() -> float:
    """Highest memory since the last reset, MiB: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    except (OSError, StopIteration):
        return psutil.Process().memory_info().rss / 2**20


class Phases:
    """Seconds and peak memory (MiB) of named phases; the marks are reset between them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"start": since_start()}
        self.memory_mb: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure the block as phase `name`; repeated phases add up."""
        _reset_peak()
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self.memory_mb[name] = max(self.memory_mb.get(name, 0.0), _peak_mb())
