"""What making a base ready takes: its weights, its data and features, its untouched scores."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ballast.forecast import disk
from ballast.forecast.architecture import Network
from ballast.forecast.flops import tower_flops
from ballast.forecast.lengths import passes
from ballast.forecast.machine import Machine
from ballast.forecast.need import IMAGES, READING, cell_need
from ballast.suite import TRAINING
from ballast.tasks import Task

# Seconds of pretraining a base here on one core.
WORLD_SECONDS = {"micro-lm": 70.0, "micro-vlm": 120.0, "micro-encoder": 80.0}
# Bytes of a second of a download; seconds of tokenising an item.
DOWNLOADED, TOKENISED = 5e7, 0.001


@dataclass(frozen=True)
class Preparation:
    """Seconds on one core or GPU; MB of host and GPU memory; bytes of disk that cells share."""

    seconds: float
    host_mb: float
    device_mb: float
    disk: float
    parts: dict[str, float]  # MB by what holds them where the base is scored


def preparation(
    source: Mapping[str, Any],
    network: Network,
    entries: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, Task],
    batch_size: int,
    gpus: int,
    machine: Machine,
    precisions: Collection[str] = ("fp32",),
    longest: bool = False,
) -> Preparation:
    """Of a base with these tasks.

    precisions: those that its cells run in, in each of which it is scored and its tower read;
    memory is that of the largest.
    """
    weights = (4 if "world" in source else 2) * network.parameters
    seconds = 2 * weights / READING
    if "world" in source:
        seconds += WORLD_SECONDS[source["world"]]
    elif "path" not in source:
        seconds += weights / DOWNLOADED
    splits = [
        count or IMAGES
        for name, entry in entries.items()
        if tasks[name].image
        for count in entry["sizes"].values()
    ]
    seconds += TOKENISED * sum(passes(tasks[n], entry["sizes"]) for n, entry in entries.items())
    spec: dict[str, Any] = {
        "family": "reparameterization", "method": "", "connector": "frozen", "modules": "all",
        "rank": 1, "target": "", "training": {}, "tasks": dict(entries),
        "evaluation": {"batch_size": batch_size, "drift": False}, "limits": {"gpus": gpus},
    }  # fmt: skip
    shared = 0.0 if "path" in source else weights
    host, device, parts = 0.0, 0.0, {}
    for precision in precisions:
        spec["training"] = TRAINING | {"batch_size": 1, "precision": precision}
        scored = cell_need(spec, network, tasks, machine, rescore=True, longest=longest)
        seconds += scored.total
        seconds += tower_flops(network, sum(splits)) / machine.rate(gpus > 0, precision)
        each = 4 if precision == "fp32" else 2
        shared += disk.feature_bytes(network, sum(splits), each)
        # The tower is there too: its features are made first, and wait on the host.
        tower = each * network.tower_parameters / 1e6
        features = disk.feature_bytes(network, max(splits, default=0), each) / 1e6
        if scored.host_mb + scored.device_mb > host + device:
            host = scored.host_mb + features + (0.0 if gpus else tower)
            device = scored.device_mb + tower if gpus else 0.0
            parts = scored.parts | ({"tower": tower} if tower else {})
    return Preparation(seconds, host, device, shared, parts)
