"""What a forecast says in words: one place for a run's opening and for `ballast plan`."""

from __future__ import annotations

import pandas as pd

from ballast.forecast.suite import BaseForecast, Forecast

STATUSES = {"failed": "failed", "stale": "stale", "rescore": "to score again"}
# A cell that should take this share of its limit is near it.
NEAR = 1.0


def counts_text(suite: str, found: pd.Series) -> str:
    """How many cells a suite has, and where they stand."""
    counts = found.value_counts()
    done = int(counts.get("ok", 0) + counts.get("failed", 0))
    parts = [f"{suite}: {len(found)} cells, {done} done"]
    parts += [f"{counts[key]} {text}" for key, text in STATUSES.items() if key in counts]
    return "; ".join(parts)


def cost_text(forecast: Forecast) -> str:
    """What is due costs in time, and what says so."""
    machine, due = forecast.machine, forecast.due
    where = f"{machine.cores} core{'s' if machine.cores != 1 else ''}"
    if due["gpu"].any():
        gpus = max(1, machine.gpus)
        where = f"{gpus} GPU{'s' if gpus != 1 else ''}" + ("" if machine.gpus else " (none here)")
    return f"about {duration(forecast.wall_seconds())} on {where} ({basis_text(forecast)})"


def basis_text(forecast: Forecast) -> str:
    """What a forecast rests on, and how far off it was where it can be checked."""
    if not forecast.finished:
        return "from sizes alone, within a factor of 3 or so: no cell has finished yet"
    whose = " of other suites" if forecast.elsewhere else ""
    text = f"from {forecast.finished} finished cell{'s' if forecast.finished > 1 else ''}{whose}"
    if forecast.spread is not None:
        text += f"; 9 of 10 of them within a factor of {forecast.spread:.1f}"
    return text


def warnings_of(forecast: Forecast) -> list[str]:
    """One sentence for each thing that should be settled before a run starts."""
    found = [
        f"base {base.name}: {base.size.problem}; " + _taken_text(base)
        for base in forecast.bases.values()
        if base.size.network is None
    ]
    due, machine = forecast.due, forecast.machine
    slow = due[due["seconds"] > NEAR * 60 * due["minutes"]]
    if len(slow):
        found.append(
            f"{cells(len(slow))} may meet the limit of {slow['minutes'].min():g} minutes: "
            f"up to {duration(slow['seconds'].max())} expected; raise limits.minutes"
        )
    large = due[due["memory_mb"] > NEAR * due["limit_mb"]]
    if len(large):
        found.append(
            f"{cells(len(large))} may meet the limit of {memory(large['limit_mb'].min())}: up to "
            f"{memory(large['memory_mb'].max())} expected; raise limits.memory_mb"
        )
    if forecast.disk_due_mb > machine.disk_free_mb:
        found.append(
            f"{memory(forecast.disk_due_mb)} of disk are needed, "
            f"{memory(machine.disk_free_mb)} are free"
        )
    return found


def device_notes(forecast: Forecast) -> list[str]:
    """What is not known of the GPUs that cells ask for, and how to say it."""
    machine = forecast.machine
    if not forecast.due["gpu"].any() or machine.gpu_name:
        return []
    if machine.gpu_memory_mb is None:
        return [
            "no GPU here: nothing was checked against a GPU's memory, and times are an A100's; say "
            "what there is, as in --gpus 4 --device-memory 80GB --memory 512GB"
        ]
    return ["no GPU here: times on GPUs are an A100's"]


def _taken_text(base: BaseForecast) -> str:
    """What a base that cannot be looked at is taken for."""
    text = f"of unknown size, taken for {count(base.network.parameters)} parameters"
    if base.size.parameters:
        text = f"taken for a Llama of {count(base.size.parameters)} parameters by its name"
    if base.network.tower is None:
        return text
    tokens = base.network.image_tokens
    return f"{text}, shown images through CLIP-L/14-336 ({tokens} tokens each)"


def cells(number: int) -> str:
    """1 cell, 2 cells."""
    return f"{number:,} cell{'s' if number != 1 else ''}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 40 s, 12 min, 3.4 h, 9 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def memory(mb: float) -> str:
    """MB as a person says them: 640 MB, 7.2 GB, 1.3 TB."""
    if mb < 1000:
        return f"{mb:.0f} MB" if mb >= 10 else f"{mb:.1f} MB"
    return f"{mb / 1e3:.1f} GB" if mb < 1e6 else f"{mb / 1e6:.1f} TB"


def count(number: float | None) -> str:
    """A count of parameters: 43,776, 1.2 M, 6.74 B."""
    if number is None:
        return "unknown"
    if number < 1e5:
        return f"{number:,.0f}"
    return f"{number / 1e6:.3g} M" if number < 1e9 else f"{number / 1e9:.3g} B"
