"""What Snakemake asks of the library at the start and the end of a run; imports no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from ballast.errors import Damaged, SuiteError
from ballast.files import set_aside, write_json
from ballast.forecast import forecast_seconds
from ballast.layout import Layout
from ballast.orphans import tied_to
from ballast.plan import plan_key, read_plan, sums_of
from ballast.records import NAME, scan, status_of
from ballast.suite import check_schema


def make_plan_file(config: dict[str, Any], root: Path, results: Path, folder: Path) -> Path:
    """The plan of a suite as a file, made in a process of its own unless it is there.

    folder: where the suite's file lies. Raises SuiteError if the suite is not valid.
    """
    layout = Layout(root, results)
    check_schema(config, layout)
    key = plan_key(config, layout, folder)
    path = layout.plan(config["suite"], key)
    if _is_whole(path) and _is_whole(path.with_suffix(".tune.parquet")):
        return path
    with tempfile.TemporaryDirectory() as place:
        request = Path(place) / "suite.json"
        write_json(request, {"config": config, "folder": str(folder), "key": key})
        command = [sys.executable, "-m", "ballast.planning", str(request)]
        command += ["--root", str(root), "--results", str(results)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ, preexec_fn=tied_to(os.getpid())
        )
    if done.returncode:
        raise SuiteError(done.stderr.strip() or f"planning ended with {done.returncode}")
    return path


def _is_whole(path: Path) -> bool:
    """Whether a plan is there and can be trusted; a damaged one is set aside, to be made again."""
    if not path.exists() or not path.with_name(sums_of(path)).exists():
        return False
    try:
        read_plan(path)
    except Damaged as error:
        print(f"{error}; the plan is made again", file=sys.stderr)
        set_aside(path)
        return False
    return True


def statuses(plan: pd.DataFrame, layout: Layout, suite: str) -> pd.Series:
    """Status by cell: ok, failed, stale, rescore or missing."""
    records, _ = scan(layout.suite(suite) / "cells")
    known = {record["id"]: record for record in records}
    return pd.Series(
        {row["id"]: status_of(row, known.get(row["id"])) for _, row in plan.iterrows()}
    )


def opening_text(plan: pd.DataFrame, layout: Layout, suite: str, cores: int) -> str:
    """How many cells a suite has, how many are done, and how long the rest may take."""
    found = statuses(plan, layout, suite)
    counts = found.value_counts()
    done = int(counts.get("ok", 0) + counts.get("failed", 0))
    due = plan.loc[~found.isin(["ok", "failed"]).to_numpy()]
    parts = [f"{suite}: {len(plan)} cells, {done} done"]
    parts += [f"{counts[s]} {s}" for s in ("failed", "stale", "rescore") if s in counts]
    if len(due):
        records, _ = scan(layout.suite(suite) / "cells")
        seconds, measured = forecast_seconds(due, records)
        basis = "from finished cells" if measured else "a rough guess before the first cell"
        parts.append(f"{len(due)} to do, about {_duration(seconds / max(1, cores))} ({basis})")
    left = plan.attrs.get("left_out", [])
    if left:
        parts.append(f"left out, as not made for the base: {', '.join(left)}")
    return "; ".join(parts)


def closing_text(plan: pd.DataFrame, layout: Layout, suite: str) -> str:
    """The leaderboard as far as records go; nothing before there are any."""
    from ballast.results import read_results
    from ballast.tables.leaderboard import screen
    from ballast.tables.output import places_of

    results = read_results(layout, suite, plan)
    if not results.records and not results.problems:
        return ""
    return "\n".join([screen(results, places_of(results), results.folder), *results.problems])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def forget_failed(plan: pd.DataFrame, layout: Layout, suite: str) -> list[str]:
    """Remove the records of failed cells, so that the next run tries again; returns their ids."""
    records, _ = scan(layout.suite(suite) / "cells")
    failed = {record["id"] for record in records if record["status"] == "failed"}
    removed = [cell for cell in plan["id"] if cell in failed]
    for cell in removed:
        (layout.cell(suite, cell) / NAME).unlink()
    return removed
