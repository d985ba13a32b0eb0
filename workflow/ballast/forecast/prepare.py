"""What making a base ready takes: its weights, its data and features, its untouched scores."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ballast.forecast import disk
from ballast.forecast.architecture import Network
from ballast.forecast.flops import tower_flops
from ballast.forecast.lengths import passes
from ballast.forecast.machine import Machine
from ballast.forecast.need import READING, cell_need
from ballast.suite import TRAINING
from ballast.tasks import Task

# Seconds of pretraining a base here on one core.
WORLD_SECONDS = {"micro-lm": 70.0, "micro-vlm": 120.0, "micro-encoder": 80.0}
# Bytes of a second of a download; seconds of tokenising an item; images of a task of unknown size.
DOWNLOADED, TOKENISED, IMAGES = 5e7, 0.001, 2000


@dataclass(frozen=True)
class Preparation:
    """Seconds on one core or GPU; MB of host memory; bytes of disk that cells share."""

    seconds: float
    host_mb: float
    disk: float


def preparation(
    source: Mapping[str, Any],
    network: Network,
    entries: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, Task],
    batch_size: int,
    gpus: int,
    machine: Machine,
    methods: Iterable[str] = (),
    longest: bool = False,
    precisions: Collection[str] = ("fp32",),
) -> Preparation:
    """Of a base with these tasks.

    methods: those of its cells, which may want decompositions; precisions: those that its cells run
    in, in each of which it is scored and its vision tower read.
    """
    each = 4 if "world" in source else 2
    weights = each * network.parameters
    seconds = 2 * weights / READING
    if "world" in source:
        seconds += WORLD_SECONDS[source["world"]]
    elif "path" not in source:
        seconds += weights / DOWNLOADED
    images = sum(
        count or IMAGES
        for name, entry in entries.items()
        if tasks[name].image
        for count in entry["sizes"].values()
    )
    features = 0.0
    for precision in precisions:
        seconds += tower_flops(network, images) / machine.rate(gpus > 0, precision)
        features += disk.feature_bytes(network, images, 4 if precision == "fp32" else 2)
    seconds += TOKENISED * sum(passes(tasks[n], entry["sizes"]) for n, entry in entries.items())
    decomposed = 0.0
    if set(methods) & disk.DECOMPOSING:
        decomposed = disk.decomposition_bytes(network, "all")
        # A singular value decomposition of an m x n matrix takes about 14 m n min(m, n) operations.
        work = sum(m * n * min(m, n) for m, n in network.stack.linear.values())
        seconds += 14 * network.stack.layers * work / machine.rate(False, "fp32")
    spec: dict[str, Any] = {
        "family": "reparameterization", "method": "", "connector": "frozen", "modules": "all",
        "rank": 1, "target": "", "training": {}, "tasks": dict(entries),
        "evaluation": {"batch_size": batch_size, "drift": False}, "limits": {"gpus": gpus},
    }  # fmt: skip
    scored = []
    for precision in precisions:
        spec["training"] = TRAINING | {"batch_size": 1, "precision": precision}
        scored.append(cell_need(spec, network, tasks, machine, rescore=True, longest=longest))
    shared = (0.0 if "path" in source else weights) + features
    return Preparation(
        seconds + sum(need.total for need in scored),
        max(need.host_mb for need in scored),
        shared + decomposed,
    )
