"""Limits of a cell, and of making its base ready: minutes, memory, GPUs.

A limit is a guard, not a forecast: what nobody says is several times what the cell should take, and
never below what suits a small base. `minutes` is wall time, `memory_mb` resident memory of the
process on its host, and `gpus` how many GPUs it gets.
"""

from __future__ import annotations

import math
from typing import Any

from ballast.forecast.bases import BaseSize

KEYS = ("minutes", "memory_mb", "gpus")
# Least limits, and what a base that is made ready gets at least.
LEAST = {"minutes": 10.0, "memory_mb": 4000}
LEAST_BASE = {"minutes": 30.0, "memory_mb": 4000}
# A base of more parameters is not for a CPU.
LARGE = 1e8
# Of a base whose size cannot be known: that of a common large model, so that the guard is wide.
UNKNOWN_PARAMETERS = 7e9
# Times a slow estimate; and FLOP/s of a core and of a GPU that are slow for their kind.
MARGIN_TIME, MARGIN_MEMORY = 4.0, 1.5
CORE_FLOPS, GPU_FLOPS = 2e10, 3e13
# Interpreter, imports and loading; a step and an item of the smallest base (seconds).
START_SECONDS, STEP_SECONDS, ITEM_SECONDS = 20.0, 0.05, 0.01
# Of a process with torch on a CPU, and with CUDA's own part (MB); bytes of a second of reading.
PROCESS_MB, CUDA_MB, READING = 1500, 4000, 2e8
# Bytes of a second of a slow download.
DOWNLOADING = 1e7
# Tokens of an example where no base says how many positions it has.
LONGEST = 2048
# Steps of pretraining a base here times the tokens of each, from above.
PRETRAINING_TOKENS = 1000 * 64 * 24


def gpus_of(size: BaseSize, device: str) -> int:
    """GPUs of a cell that asks for none in so many words: one for `cuda`, or for a large base."""
    return int(device == "cuda" or (device == "auto" and _parameters(size) > LARGE))


def cell_limits(spec: dict[str, Any], size: BaseSize, own: dict[str, Any]) -> dict[str, Any]:
    """Limits of a cell: what the suite or the base says (`own`), and what is left from its size."""
    training = spec["training"]
    gpus = _own_gpus(own, size, training["device"])
    parameters = _parameters(size)
    length = _length(size, training["max_length"])
    trains = spec["family"] != "post-hoc"
    steps = training["steps"] * training["accumulation"] if trains else 0
    items = sum(entry["sizes"]["test"] for entry in spec["tasks"].values())
    tokens = 8 * steps * training["batch_size"] * length + 2 * 5 * items * length
    seconds = START_SECONDS + steps * STEP_SECONDS + items * ITEM_SECONDS
    rate = GPU_FLOPS * gpus if gpus else CORE_FLOPS * training["threads"]
    seconds += parameters * tokens / rate + 4 * parameters / READING
    found = {
        "minutes": _rounded(max(LEAST["minutes"], MARGIN_TIME * seconds / 60)),
        "memory_mb": int(_rounded(max(LEAST["memory_mb"], _memory(spec, size, gpus, length)))),
        "gpus": gpus,
    }
    return found | {key: own[key] for key in ("minutes", "memory_mb") if key in own}


def base_limits(
    source: dict[str, Any],
    entries: dict[str, dict[str, Any]],
    trainings: list[dict[str, Any]],
    batch_size: int,
    size: BaseSize,
    own: dict[str, Any],
) -> dict[str, Any]:
    """Limits of making a base ready: pretraining or downloading, its data, its untouched scores.

    entries: its tasks; trainings: its targets' settings; batch_size: of evaluation. What `own` says
    of its cells is the least that it gets.
    """
    parameters = _parameters(size)
    length = max(_length(size, training["max_length"]) for training in trainings)
    items = sum(sum(n or 0 for n in entry["sizes"].values()) for entry in entries.values())
    gpus = max(_own_gpus(own, size, training["device"]) for training in trainings)
    rate = GPU_FLOPS * gpus if gpus else CORE_FLOPS
    seconds = START_SECONDS + items * ITEM_SECONDS + 2 * 5 * parameters * items * length / rate
    if "world" in source:
        seconds += 6 * parameters * PRETRAINING_TOKENS / CORE_FLOPS
    seconds += 4 * parameters / DOWNLOADING
    memory = PROCESS_MB + (CUDA_MB if gpus else 0) + 4 * parameters / 1e6
    if size.network and not gpus:
        memory += 12 * batch_size * length * size.network.vocabulary / 1e6
    least = {key: max(LEAST_BASE[key], own.get(key, 0)) for key in LEAST_BASE}
    return {
        "minutes": _rounded(max(least["minutes"], MARGIN_TIME * seconds / 60)),
        "memory_mb": int(_rounded(max(least["memory_mb"], MARGIN_MEMORY * memory))),
        "gpus": gpus,
    }


def limits_at(limits: dict[str, Any], attempt: int) -> tuple[float, int]:
    """Minutes and MB of a job's attempt, from 1: every retry doubles both."""
    factor = 2 ** (attempt - 1)
    return limits["minutes"] * factor, limits["memory_mb"] * factor


def _parameters(size: BaseSize) -> float:
    return UNKNOWN_PARAMETERS if size.parameters is None else size.parameters


def _own_gpus(own: dict[str, Any], size: BaseSize, device: str) -> int:
    asked = own.get("gpus", "auto")
    return gpus_of(size, device) if asked == "auto" else asked


def _length(size: BaseSize, max_length: int) -> int:
    """The most tokens that an example can have."""
    return min(max_length, size.network.positions if size.network else LONGEST)


def _memory(spec: dict[str, Any], size: BaseSize, gpus: int, length: int) -> float:
    """MB of resident host memory, with its margin."""
    training = spec["training"]
    parameters = _parameters(size)
    each = 4 if training["precision"] == "fp32" else 2
    weights = each * parameters
    if spec["family"] == "post-hoc":
        held = weights + 3 * 4 * parameters  # parents' updates
    elif spec["family"] == "selective":
        held = weights + (each + 8) * parameters
    else:
        held = weights + 0.25 * (each + 8) * parameters
    process = PROCESS_MB
    if gpus:
        # What is trained lies on the GPU; the host reads the weights and writes the checkpoint.
        process += CUDA_MB
    elif size.network is not None:
        stack, tokens = size.network.stack, training["batch_size"] * length
        held += 2 * each * tokens * stack.layers * (8 * stack.width + 3 * stack.inner)
        rows = max(tokens, spec["evaluation"]["batch_size"] * length)
        held += 12 * rows * size.network.vocabulary
    return MARGIN_MEMORY * (process + held / 1e6)


def _rounded(value: float) -> float:
    """A number to two digits, upwards."""
    step = 10 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / step - 1e-9) * step, 6)
