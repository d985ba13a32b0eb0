"""What Snakemake asks of the library at the start and the end of a run; imports no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from ballast.errors import Damaged, SuiteError
from ballast.files import remove_parts, set_aside, write_json
from ballast.forecast.machine import this_machine
from ballast.forecast.suite import DUE, forecast_suite
from ballast.forecast.words import cost_text, counts_text, warnings_of
from ballast.layout import Layout
from ballast.orphans import tied_to
from ballast.plan import plan_key, read_plan, sums_of
from ballast.records import NAME, scan, status_of
from ballast.spares import drop_spare
from ballast.suite import check_schema


def make_plan_file(config: dict[str, Any], root: Path, results: Path, folder: Path) -> Path:
    """The plan of a suite as a file, made in a process of its own unless it is there.

    folder: where the suite's file lies. Raises SuiteError if the suite is not valid.
    """
    layout = Layout(root, results)
    check_schema(config, layout)
    key = plan_key(config, layout, folder)
    path = layout.plan(config["suite"], key)
    remove_parts(path.parent)
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
    return statuses_of(plan, records)


def statuses_of(plan: pd.DataFrame, records: Sequence[dict[str, Any]]) -> pd.Series:
    """Status by cell, from the suite's records."""
    known = {record["id"]: record for record in records}
    rows = plan[["id", "train_key", "eval_key"]].to_dict("records")
    return pd.Series(
        {row["id"]: status_of(row, known.get(row["id"])) for row in rows}, dtype=object
    )


def opening_text(
    plan: pd.DataFrame, layout: Layout, suite: str, cores: int | None, gpus: int | None = None
) -> str:
    """How many cells a suite has, how many are done, and what the rest may take.

    cores, gpus: how many cells run at a time at most; None: the GPUs of this machine.
    """
    records, _ = scan(layout.suite(suite) / "cells")
    found = statuses_of(plan, records)
    parts = [counts_text(suite, found)]
    if found.isin(DUE).any():
        machine = replace(this_machine(layout.results), cores=max(1, cores or 1))
        machine = machine if gpus is None else replace(machine, gpus=gpus)
        forecast = forecast_suite(plan, found, records, layout, machine)
        parts.append(f"{len(forecast.due)} to do, {cost_text(forecast)}")
        parts += warnings_of(forecast)
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


def forget_failed(plan: pd.DataFrame, layout: Layout, suite: str) -> list[str]:
    """Remove the records of failed cells, so that the next run tries again; returns their ids."""
    records, _ = scan(layout.suite(suite) / "cells")
    failed = {record["id"] for record in records if record["status"] == "failed"}
    removed = [cell for cell in plan["id"] if cell in failed]
    for cell in removed:
        path = layout.cell(suite, cell) / NAME
        drop_spare(path)
        path.unlink()
    return removed
