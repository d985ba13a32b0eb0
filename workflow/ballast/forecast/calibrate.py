"""Forecasts set right by finished cells: what they took against what shapes alone would say.

Each phase has a factor of its own. It is the median of finished cells that are most alike: of the
same base, target, method and rank; else of the same base and method, of the method, of the base and
its family, of the base, of any. Memory has an offset instead, and of the disk the adapter alone has
a factor, where its size is a guess.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ballast.forecast.need import PHASES, Need

Key = tuple[Any, ...]
QUANTITIES = (*PHASES, "adapter", "host_mb", "device_mb")
OFFSETS = ("host_mb", "device_mb")


def likeness(spec: Mapping[str, Any]) -> list[Key]:
    """Keys of a cell from the closest likeness to the loosest."""
    base, target, method = spec["base"], spec["target"], spec["method"]
    return [
        (0, base, target, method, spec["variant"], spec["rank"]),
        (1, base, target, method),
        (2, base, method),
        (3, method),
        (4, base, target, spec["family"]),
        (5, base, spec["family"]),
        (6, base),
        (7, spec["family"]),
        (8,),
    ]


@dataclass
class Calibration:
    """Factors and offsets by likeness; `cells` finished cells of the same kind of device."""

    found: dict[tuple[str, Key], list[float]] = field(default_factory=lambda: defaultdict(list))
    cells: int = 0
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, spec: Mapping[str, Any], need: Need, record: Mapping[str, Any]) -> None:
        """Learn from a finished cell, whose need was forecast from shapes alone."""
        self.cells += 1
        for quantity, value in compared(need, record).items():
            for key in likeness(spec):
                self.found[quantity, key].append(value)

    def factor(self, quantity: str, spec: Mapping[str, Any]) -> float | None:
        """The factor, or offset, of a quantity for a cell; None before any cell has finished."""
        for key in likeness(spec):
            if values := self.found.get((quantity, key)):
                return statistics.median(values)
        return None

    def level(self, spec: Mapping[str, Any]) -> int | None:
        """How alike the closest finished cells are, 0 to 8; None if there are none."""
        for key in likeness(spec):
            if ("evaluate", key) in self.found:
                return key[0]
        return None

    def apply(self, spec: Mapping[str, Any], need: Need) -> Need:
        """A need set right."""
        if not self.cells:
            return need
        seconds = {p: t * (self.factor(p, spec) or 1.0) for p, t in need.seconds.items()}
        offset = self.factor("device_mb" if need.gpu else "host_mb", spec) or 0.0
        changed = "device_mb" if need.gpu else "host_mb"
        before = getattr(need, changed)
        return replace(
            need,
            seconds=seconds,
            adapter=need.adapter * (1.0 if need.measured else self.factor("adapter", spec) or 1.0),
            **{changed: max(before / 2, before + offset)},
        )


def compared(need: Need, record: Mapping[str, Any]) -> dict[str, float]:
    """Measured over forecast by phase and for the adapter; measured minus forecast for memory."""
    costs = record["costs"]
    spent = costs["seconds"]
    scored = (spent.get("evaluate") or 0.0) + (spent.get("drift") or 0.0)
    measured = {
        "train": spent.get("train") or 0.0,
        "evaluate": scored,
        "fixed": (spent.get("total") or 0.0) - (spent.get("train") or 0.0) - scored,
    }
    found = {
        phase: seconds / need.seconds[phase]
        for phase, seconds in measured.items()
        if seconds > 0 and need.seconds[phase] > 0
    }
    if costs.get("adapter_bytes") and need.adapter and not need.measured:
        found["adapter"] = costs["adapter_bytes"] / need.adapter
    peaks = [value for value in costs["memory_mb"].values() if value]
    if peaks:
        kind = "device_mb" if need.gpu else "host_mb"
        found[kind] = 1.048576 * max(peaks) - getattr(need, kind)
    return found


def usable(record: Mapping[str, Any], gpu: bool) -> bool:
    """Whether a record says something about cells on a GPU, or on a CPU."""
    if record["status"] != "ok" or not record["costs"]["seconds"].get("total"):
        return False
    device = str(record["provenance"].get("device", "cpu"))
    return device.startswith("cuda") == gpu


def calibrated(
    cells: Iterable[tuple[Mapping[str, Any], Need, Mapping[str, Any]]],
    left_out: Callable[[Mapping[str, Any]], bool] = lambda _: False,
) -> Calibration:
    """Calibration from (spec, need, record) of finished cells, without those that are left out."""
    made = Calibration()
    for spec, need, record in cells:
        if not left_out(spec) and usable(record, need.gpu):
            made.add(spec, need, record)
    return made
