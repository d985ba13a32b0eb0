"""One curve of one cell, alone or supervised: `python -m ballast.curves.curve_job PLAN CELL KIND`.

In a process that is warm already: `run_curve(row, layout, kind)`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import IO, Any

import ballast.quiet  # noqa: F401  (first: the libraries read its settings when imported)
from ballast.curves import (
    KINDS,
    finished_record,
    is_current,
    new_curve,
    points_of,
    settings_of,
    write_curve,
)
from ballast.devices import DeviceError, lease
from ballast.errors import BallastError
from ballast.files import remove_parts_of
from ballast.layout import Layout
from ballast.limits import limits_at
from ballast.plan import row_of
from ballast.progress import Watcher
from ballast.supervise import Orphaned, run_check, run_limited


def run_curve(row: dict[str, Any], layout: Layout, kind: str) -> Path:
    """Make and write one curve of a plan's row (a dict) in this process; returns its file.

    A curve that is there already, under the same keys and settings, is left alone.
    Raises BallastError if the cell has not been run as planned.
    """
    path = layout.curve(json.loads(row["spec"])["suite"], row["id"], kind)
    remove_parts_of(path)
    if is_current(row, layout, kind):
        return path
    curve = new_curve(row, kind, finished_record(row, layout))
    if not curve["left_out"]:
        if kind == "rewind":
            from ballast.curves.rewind import run_rewind as run
        else:
            from ballast.curves.trajectory import run_trajectory as run
        curve = run(row, layout)
    return write_curve(curve, row, layout)


def finish_curve(
    plan: Path, cell: str, kind: str, layout: Layout, attempt: int, log: IO[str]
) -> int:
    """Make a curve in a child within the cell's memory and its time for every point.

    Returns the exit code of the job; limits are doubled by every retry, as those of cells.
    """
    spec = json.loads(row_of(plan, cell)["spec"])
    points = points_of(settings_of(spec, kind))
    minutes, memory_mb = limits_at(spec["limits"], attempt)
    command = [sys.executable, "-m", "ballast.curves.curve_job", str(plan), cell, kind]
    command += ["--root", str(layout.root), "--results", str(layout.results)]
    seconds = 60 * minutes * (1 + points)
    try:
        with lease(spec["limits"]["gpus"], cell, run_check()) as gpus:
            watcher = Watcher(f"{cell} {kind}")
            end = run_limited(command, seconds, memory_mb, log, watcher, gpus=gpus)
    except (Orphaned, DeviceError) as error:
        print(f"{cell}: {error}", file=log)
        return 1
    if end.kind is not None:
        print(f"{cell}: {kind}: {end.kind}: {end.reason}", file=sys.stderr)
    elif end.code:
        print(f"{cell}: {kind}: exit code {end.code}; see {log.name}", file=sys.stderr)
    return 1 if end.kind is not None or end.code else 0


def main(arguments: list[str] | None = None) -> int:
    """Make one curve; exits with 1 and one line where the cell is not ready for it."""
    parser = argparse.ArgumentParser(prog="python -m ballast.curves.curve_job", description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("cell")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    layout = Layout(options.root or Layout.here().root, options.results)
    row = row_of(options.plan, options.cell)
    try:
        run_curve(row, layout, options.kind)
    except BallastError as error:
        print(f"{options.cell}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
