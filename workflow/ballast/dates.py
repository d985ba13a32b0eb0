"""Dates of files from a clock that was ahead: Snakemake would make their successors for ever."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

STEP = 1000  # nanoseconds between files whose order is kept
# Of a suite's folder, what Snakemake compares the dates of.
COMPARED = (
    "bases/*.json", "cells/*/run.json", "tune/cells/*/run.json", "tune/*.*", "curves/*.json",
    "tables/*", "tables/.*", "figures/*", "leaderboard/*", "leaderboard/.*",
)  # fmt: skip


def without_future(home: Path, tolerance: float = 1.0) -> list[Path]:
    """Give files of a suite's folder that are dated in the future a date of now, in their order.

    tolerance: seconds that two machines' clocks may differ by. Returns the files that were changed;
    one that another process removes meanwhile, or another user owns, is left as it is.
    """
    now = time.time_ns()
    dated = {}
    for path in (path for kind in COMPARED for path in home.glob(kind)):
        with contextlib.suppress(FileNotFoundError):
            dated[path] = path.stat().st_mtime_ns
    ahead = {path: date for path, date in dated.items() if date > now + tolerance * 1e9}
    order = {date: place for place, date in enumerate(sorted(set(ahead.values())))}
    changed = []
    for path, date in ahead.items():
        own = now - STEP * (len(order) - order[date])
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.utime(path, ns=(own, own))
            changed.append(path)
    return sorted(changed)
