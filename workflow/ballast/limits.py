"""Limits of a cell, and of making its base ready: minutes, memory, GPUs.

A limit is a guard, not a forecast: what nobody says is several times what the cell should take on a
slow machine, more than it should with examples as long as they may be, and never below what suits a
small base.
`minutes` is wall time, `memory_mb` what the process holds in its host's memory (`footprint`: MB of
10^6 bytes, pages of files not counted), and `gpus` how many GPUs it gets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ballast.forecast.bases import BaseSize
from ballast.forecast.machine import Machine
from ballast.forecast.need import cell_need, decomposing_seconds
from ballast.forecast.prepare import preparation
from ballast.tasks import Task

KEYS = ("minutes", "memory_mb", "gpus")
# Least limits of a cell, and of a base that is made ready.
LEAST = {"minutes": 10.0, "memory_mb": 4000}
LEAST_BASE = {"minutes": 30.0, "memory_mb": 4000}
# A base of more parameters is not for a CPU.
LARGE = 1e8
# Times the forecast of shapes alone. Of time: of usual examples, and of the longest that there may
# be, on a CPU that others may use too, and on a GPU that nobody else does and is slow for its kind.
MARGIN_TIME, MARGIN_MEMORY = 4.0, 1.5
MARGIN_GPU, MARGIN_GPU_LONGEST = 3.5, 1.0
SLOW = Machine(1, 1, math.inf, None, "V100", math.inf)


def gpus_of(size: BaseSize, device: str) -> int:
    """GPUs of a cell that asks for none in so many words: one for `cuda`, or for a large base."""
    return int(device == "cuda" or (device == "auto" and size.shape.parameters > LARGE))


def cell_limits(
    spec: dict[str, Any], size: BaseSize, tasks: Mapping[str, Task], own: dict[str, Any]
) -> dict[str, Any]:
    """Limits of a cell: what the suite or the base says (`own`), and what is left from its size."""
    gpus = _own_gpus(own, size, spec["training"]["device"])
    if not {"minutes", "memory_mb"} <= own.keys():
        own_spec = spec | {"limits": {"gpus": gpus}}
        usual, longest = (
            cell_need(own_spec, size.shape, tasks, SLOW, longest=most) for most in (False, True)
        )
        # Cells start at once: each of them may have to decompose the base by itself.
        alone = MARGIN_TIME * decomposing_seconds(spec, size.shape, SLOW)
        seconds = _with_margin(usual.total, longest.total, gpus) + alone
        found = _guard(LEAST, seconds, longest.host_mb)
    else:
        found = {}
    return found | {key: own[key] for key in LEAST if key in own} | {"gpus": gpus}


def base_limits(
    source: dict[str, Any],
    entries: dict[str, dict[str, Any]],
    trainings: list[dict[str, Any]],
    batch_size: int,
    size: BaseSize,
    tasks: Mapping[str, Task],
    own: dict[str, Any],
) -> dict[str, Any]:
    """Limits of making a base ready: pretraining or downloading, its data, its untouched scores.

    entries: its tasks; trainings: its targets' settings; batch_size: of evaluation. What `own` says
    of its cells is the least that it gets.
    """
    gpus = max(_own_gpus(own, size, training["device"]) for training in trainings)
    precisions = sorted({training["precision"] for training in trainings})
    usual, longest = (
        preparation(source, size.shape, entries, tasks, batch_size, gpus, SLOW, precisions, most)
        for most in (False, True)
    )
    least = {key: max(LEAST_BASE[key], own.get(key, 0)) for key in LEAST_BASE}
    seconds = _with_margin(usual.seconds, longest.seconds, gpus)
    return _guard(least, seconds, longest.host_mb) | {"gpus": gpus}


def limits_at(limits: dict[str, Any], attempt: int) -> tuple[float, int]:
    """Minutes and MB of a job's attempt, from 1: every retry doubles both."""
    factor = 2 ** (attempt - 1)
    return limits["minutes"] * factor, limits["memory_mb"] * factor


def _own_gpus(own: dict[str, Any], size: BaseSize, device: str) -> int:
    asked = own.get("gpus", "auto")
    return gpus_of(size, device) if asked == "auto" else asked


def _with_margin(usual: float, longest: float, gpus: int) -> float:
    """Seconds that are allowed for a forecast of so many, with usual and with longest examples."""
    if gpus:
        return max(MARGIN_GPU * usual, MARGIN_GPU_LONGEST * longest)
    return MARGIN_TIME * longest


def _guard(least: Mapping[str, float], seconds: float, mb: float) -> dict[str, Any]:
    """Limits of what is allowed so many seconds and is forecast to hold so many MB."""
    minutes = max(least["minutes"], _rounded(seconds / 60))
    return {
        "minutes": minutes,
        "memory_mb": int(max(least["memory_mb"], _rounded(MARGIN_MEMORY * mb))),
    }


def _rounded(value: float) -> float:
    """A number above 0 to two digits, upwards."""
    step = 10 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / step - 1e-9) * step, 6)
