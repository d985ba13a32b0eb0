"""`ballast plan`: what a suite has, where it stands, and what it will cost."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ballast.commands.options import JsonOption
from ballast.commands.work import DEFAULT, SuiteArgument, plan_file, read_table
from ballast.layout import Layout

if TYPE_CHECKING:
    import pandas as pd

    from ballast.forecast.fits import TooLarge
    from ballast.forecast.machine import Machine
    from ballast.forecast.suite import Forecast


def add_to(app: typer.Typer) -> None:
    """Register the command of this module."""
    app.command()(plan)


def plan(
    suite: SuiteArgument = DEFAULT,
    cells: Annotated[bool, typer.Option("--cells", help="List every cell instead.")] = False,
    cores: Annotated[int | None, typer.Option(min=1, help="Cores to plan for.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs to plan for.")] = None,
    device_memory: Annotated[
        str | None, typer.Option(metavar="24GB", help="Memory of one GPU to plan for.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="64GB", help="Memory of the machine to plan for.")
    ] = None,
    json: JsonOption = False,
) -> int:
    """Say before it runs what a suite has and costs: cells, hours, memory, disk."""
    from ballast.forecast.fits import too_large
    from ballast.forecast.machine import parse_memory, this_machine
    from ballast.forecast.suite import forecast_suite
    from ballast.records import scan
    from ballast.status import statuses_of
    from ballast.tasks import read_tasks

    layout = Layout.here()
    here = this_machine(layout.results)
    machine = replace(
        here,
        cores=here.cores if cores is None else cores,
        gpus=here.gpus if gpus is None else gpus,
        memory_mb=here.memory_mb if memory is None else parse_memory(memory),
        gpu_memory_mb=(
            here.gpu_memory_mb if device_memory is None else parse_memory(device_memory)
        ),
    )
    name, path = plan_file(suite, layout)
    table = read_table(path)
    records, problems = scan(layout.suite(name) / "cells")
    found = statuses_of(table, records)
    forecast = forecast_suite(table, found, records, layout, machine, thorough=True)
    large = too_large(forecast, read_tasks(layout.tasks), machine.gpu_memory_mb, machine.memory_mb)
    if json:
        from ballast.commands.screen import print_json

        print_json(_as_json(name, forecast, large, machine, cells))
    elif cells:
        _list(forecast)
    else:
        _show(name, forecast, large, machine, problems)
    return 0


def _list(forecast: Forecast) -> None:
    """Every cell with its status, and what one that is due should take."""
    from ballast.forecast.words import duration, memory

    for row in forecast.cells.itertuples():
        cost = ""
        if row.seconds:
            cost = f"  {duration(row.seconds)}, {memory(row.memory_mb)}"
            cost += f", GPU {memory(row.device_mb)}" if row.gpu else ""
        print(f"{row.status:8} {row.id}{cost}")


def _show(
    name: str,
    forecast: Forecast,
    large: list[TooLarge],
    machine: Machine,
    problems: list[str],
) -> None:
    from ballast.commands.screen import Screen
    from ballast.forecast.words import counts_text, device_notes, warnings_of

    screen = Screen()
    screen.line(counts_text(name, forecast.cells["status"]), style="bold")
    screen.heading("Bases")
    screen.table(["base", "parameters", "state"], [_base_row(b) for b in forecast.bases.values()])
    for base, target in dict.fromkeys(
        zip(forecast.cells["base"], forecast.cells["target"], strict=True)
    ):
        rows = forecast.cells.query("base == @base and target == @target")
        screen.heading(f"{base}, {target}")
        gpu = bool(rows["gpu"].any())
        headers = ["method", "cells", "due", "trained", "a cell", "memory", "GPU", "disk"]
        lines = [
            _method_row(method, part, gpu) for method, part in rows.groupby("method", sort=False)
        ]
        keep = [i for i, header in enumerate(headers) if gpu or header != "GPU"]
        screen.table([headers[i] for i in keep], [[line[i] for i in keep] for line in lines])
    screen.heading("In all")
    screen.facts(_totals(forecast, machine))
    notes = warnings_of(forecast) + device_notes(forecast) + problems
    if notes or large:
        screen.heading("Before it starts")
    for note in notes:
        screen.line(f"- {note}")
    for item in large:
        screen.line(f"- {_large_text(item)}")


def _large_text(item: TooLarge) -> str:
    """What does not fit, by how much, and what would make it fit."""
    from ballast.forecast.fits import advice_text
    from ballast.forecast.words import cells, memory

    where = "a GPU" if item.kind == "GPU" else "this machine's memory"
    parts = ", ".join(f"{key} {memory(mb)}" for key, mb in _largest(item.parts))
    who = f"{item.method} on {item.base}, {item.target} ({cells(item.cells)})"
    if not item.method:
        who = f"base {item.base}, to be scored before its cells"
    # Without advice it is the need under the harshest settings.
    needed = f"needs {'up to' if item.advice else 'at least'} {memory(item.needed_mb)} ({parts})"
    return f"{who}: {needed}, {where} has {memory(item.there_mb)}; {advice_text(item.advice)}"


def _base_row(base: Any) -> list[str]:
    from ballast.forecast.words import count, duration, memory

    state = "ready"
    if not base.ready:
        state = f"to be made: {duration(base.seconds)}, {memory(base.disk / 1e6)} of disk"
    size = count(base.network.parameters if base.size.network else base.size.parameters)
    return [base.name, size, state]


def _method_row(method: str, rows: pd.DataFrame, gpu: bool) -> list[str]:
    """method, cells, due, trained parameters, seconds of one cell, memory, GPU memory, disk."""
    from ballast.forecast.suite import DUE
    from ballast.forecast.words import count, duration, memory

    due = rows[rows["status"].isin(DUE)]
    trained = sorted(set(rows["trainable"]))
    low, high = count(trained[0]), count(trained[-1])
    return [
        method,
        str(len(rows)),
        str(len(due)),
        "-" if not trained[-1] else low if low == high else f"{low} to {high}",
        duration(float(due["seconds"].median())) if len(due) else "-",
        memory(float(rows["memory_mb"].max())),
        memory(float(rows["device_mb"].max())) if gpu else "",
        memory(float(rows["disk_mb"].sum())),
    ]


def _totals(forecast: Forecast, machine: Machine) -> list[tuple[str, str]]:
    from ballast.forecast.words import basis_text, cells, cost_text, duration, memory

    due = forecast.due
    facts = []
    if len(due):
        rescored = int((due["status"] == "rescore").sum())
        told = f"{cells(len(due))}" + (f", {rescored} of them to score again" if rescored else "")
        facts = [("to do", told), ("time", cost_text(forecast))]
        if forecast.hours(gpu=False):
            facts.append(("core-hours", f"{forecast.hours(gpu=False):.2f}"))
        if forecast.hours(gpu=True):
            facts.append(("GPU-hours", f"{forecast.hours(gpu=True):.1f}"))
        facts.append(("operations", f"{due['flops'].sum():.2g} FLOP"))
        longest = due.loc[due["seconds"].idxmax()]
        facts.append(("longest cell", f"{duration(longest['seconds'])}, {longest['id']}"))
        facts.append(("memory", f"{memory(due['memory_mb'].max())} in one cell at most"))
        if due["gpu"].any():
            there = memory(machine.gpu_memory_mb) if machine.gpu_memory_mb else "none here"
            facts.append(("GPU memory", f"{memory(due['device_mb'].max())} in one cell; {there}"))
    else:
        facts.append(("to do", "nothing"))
        facts.append(("basis", basis_text(forecast)))
    written = f", {memory(forecast.disk_due_mb)} still to be written" if len(due) else ""
    free = memory(machine.disk_free_mb)
    facts.append(("disk", f"{memory(forecast.disk_mb)} in all{written}; {free} are free"))
    return facts


def _largest(parts: dict[str, float]) -> list[tuple[str, float]]:
    held = [(key, mb) for key, mb in parts.items() if mb]
    return sorted(held, key=lambda item: -item[1])[:3]


def _as_json(
    name: str, forecast: Forecast, large: list[TooLarge], machine: Machine, cells: bool
) -> dict[str, Any]:
    from dataclasses import asdict

    from ballast.forecast.words import device_notes, warnings_of

    due = forecast.due
    gpu = bool(due["gpu"].any())
    found = {
        "suite": name,
        "cells": len(forecast.cells),
        "status": forecast.cells["status"].value_counts().to_dict(),
        "due": len(due),
        "core_hours": forecast.hours(gpu=False),
        "gpu_hours": forecast.hours(gpu=True),
        "wall_seconds": forecast.wall_seconds() if len(due) else 0.0,
        "flops": float(due["flops"].sum()),
        "peak_memory_mb": float(due["memory_mb"].max()) if len(due) else None,
        "peak_gpu_memory_mb": float(due["device_mb"].max()) if gpu else None,
        "disk_mb": forecast.disk_mb,
        "disk_due_mb": forecast.disk_due_mb,
        "machine": asdict(machine),
        "finished_cells": forecast.finished,
        "of_other_suites": forecast.elsewhere,
        "nine_of_ten_within_factor": forecast.spread,
        "bases": {
            base.name: {
                "parameters": base.size.parameters,
                "origin": base.size.origin,
                "ready": base.ready,
                "seconds": base.seconds,
                "disk_mb": base.disk / 1e6,
                "problem": base.size.problem or None,
            }
            for base in forecast.bases.values()
        },
        "does_not_fit": [asdict(item) for item in large],
        "warnings": warnings_of(forecast) + device_notes(forecast),
    }
    if cells:
        kept = ["id", "status", "gpu", "seconds", "flops", "memory_mb", "device_mb", "disk_mb",
                "trainable", "minutes", "limit_mb"]  # fmt: skip
        found["cell"] = forecast.cells[kept].to_dict("records")
    return found
