"""What one cell needs: operations, seconds, memory and disk, from shapes and settings alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ballast.forecast import disk, memory
from ballast.forecast.architecture import Network
from ballast.forecast.flops import forward_flops, training_flops
from ballast.forecast.holding import Footprint, footprint_guess
from ballast.forecast.lengths import example_tokens, generated_tokens, passes
from ballast.forecast.machine import Machine
from ballast.forecast.trainable import trainable_guess
from ballast.tasks import Task

# Phases that finished cells set right; writing adapters and checkpoints is in no record.
PHASES = ("fixed", "train", "evaluate")
# Seconds of a small cell on one core: Python's imports and the base's loading, an optimiser step
# without its operations, a scored sequence, a generated token of a batch, a task.
START, STEP, SEQUENCE, DECODED, TASK = 7.0, 0.008, 0.0006, 0.01, 0.05
GPU_START, GPU_STEP = 15.0, 0.06  # CUDA's own start; launching a large model's kernels
# Bytes of a second that weights are read, checked and written with.
READING = 4e8
# The longest of a batch over the usual example.
PADDED = 1.3
# Images of a split whose size the suite does not say.
IMAGES = 2000
# The part of scoring that the comparison with the untouched base adds.
DRIFT = 1.08


@dataclass(frozen=True)
class Need:
    """Needs of a cell. Seconds by phase on one machine; memory in MB; disk in bytes."""

    gpu: bool
    flops: float
    trainable: float
    seconds: dict[str, float]
    host_mb: float
    device_mb: float
    adapter: float
    others: float
    checkpoint: float
    parts: dict[str, float]
    host_parts: dict[str, float]
    measured: bool = False  # whether the adapter's size is by a footprint, and no guess

    @property
    def disk(self) -> float:
        return self.adapter + self.others

    @property
    def total(self) -> float:
        """Seconds of the cell's process."""
        return sum(self.seconds.values())


def cell_need(
    spec: dict[str, Any],
    network: Network,
    tasks: Mapping[str, Task],
    machine: Machine,
    tokens: Mapping[str, float] | None = None,
    trainable: float | None = None,
    rescore: bool = False,
    longest: bool = False,
    footprint: Footprint | None = None,
) -> Need:
    """Needs of a cell of a plan.

    tokens: measured tokens of a training example by target; trainable: as counted; footprint: as
    measured; all are estimated where they are missing. rescore: nothing is trained, a stored
    adapter is scored. longest: for examples as long as they may be.
    """
    training, entries = spec["training"], spec["tasks"]
    gpu = spec["limits"]["gpus"] > 0
    rate = machine.rate(gpu, training["precision"], training["threads"])
    if trainable is None:
        trainable = trainable_guess(spec, network)
    measured = footprint is not None or spec["family"] == "post-hoc"
    if footprint is None:
        footprint = footprint_guess(spec, network, trainable)
    trains = spec["family"] != "post-hoc" and not rescore
    shown = {name: network.image_tokens if tasks[name].image else 0 for name in entries}
    texts = {
        name: example_tokens(tasks[name], entry["max_length"], network.positions, longest)
        for name, entry in entries.items()
    }
    lengths = {name: texts[name] + shown[name] for name in entries}
    members = [name for name, entry in entries.items() if entry["role"] == "target"]
    members = members or list(entries)
    length = sum(lengths[name] for name in members) / len(members)
    length = (tokens or {}).get(spec["target"], length)
    train_flops = train_seconds = written = 0.0
    checkpoint = disk.checkpoint_bytes(spec, footprint) if trains else 0.0
    adapter = disk.adapter_bytes(spec, network, footprint)
    if trains:
        written = (training["steps"] - 1) // training["checkpoint_every"] * checkpoint
        steps = training["steps"] * training["accumulation"]
        seen = steps * training["batch_size"] * length
        selective = spec["family"] == "selective"
        # Of a mask's weights, too, gradients are computed that it then drops.
        moved = footprint.held if selective else trainable
        train_flops = training_flops(
            network, seen, length, moved, selective, training["gradient_checkpointing"]
        )
        train_seconds = train_flops / rate + steps * (GPU_STEP if gpu else STEP)
    eval_flops, eval_seconds = _scoring(spec, network, tasks, lengths, rate, machine, gpu)
    each = disk.each_of(spec)
    weights = each * network.parameters
    fixed = START + (GPU_START if gpu else 0.0) + 2 * weights / READING
    padded = {
        name: _padded(text, entries[name]["max_length"], network) + shown[name]
        for name, text in texts.items()
    }
    held = memory.peak(
        spec,
        network,
        footprint,
        max(padded[name] for name in members),
        gpu,
        [memory.Scored(padded[name], generated_tokens(tasks[name])) for name in entries],
        disk.feature_bytes(network, _images(tasks, members, entries), each),
    )
    return Need(
        gpu=gpu,
        flops=train_flops + eval_flops,
        trainable=trainable,
        seconds={
            "fixed": fixed,
            "train": train_seconds,
            "evaluate": eval_seconds,
            "write": (written + (0.0 if rescore else adapter)) / READING,
        },
        host_mb=held.host_mb,
        device_mb=held.device_mb,
        adapter=adapter,
        others=disk.other_bytes(spec),
        checkpoint=checkpoint,
        parts=held.parts,
        host_parts=held.host_parts,
        measured=measured,
    )


def decomposing_seconds(
    spec: dict[str, Any],
    network: Network,
    machine: Machine,
    footprint: Footprint | None = None,
) -> float:
    """Seconds of decomposing the base's weights and keeping that, if a cell's method asks for it.

    The first of a base's cells does so for all.
    """
    found = footprint or footprint_guess(spec, network, 0.0)
    rate = machine.rate(False, "fp32", spec["training"]["threads"])
    return found.decomposing / rate + found.decomposed / READING


def _padded(text: float, max_length: int | None, network: Network) -> float:
    """Tokens of the longest text of a batch, where one has so many."""
    return max(text, min(PADDED * text, max_length or network.positions, network.positions))


def _images(
    tasks: Mapping[str, Task], members: Sequence[str], entries: Mapping[str, Mapping[str, Any]]
) -> float:
    """Images of the training examples."""
    shown = [entries[name]["sizes"] for name in members if tasks[name].image]
    return sum(sizes.get("train") or IMAGES for sizes in shown)


def _scoring(
    spec: dict[str, Any],
    network: Network,
    tasks: Mapping[str, Task],
    lengths: Mapping[str, float],
    rate: float,
    machine: Machine,
    gpu: bool,
) -> tuple[float, float]:
    """Operations and seconds of scoring a cell on all its tasks."""
    batch = spec["evaluation"]["batch_size"]
    each = disk.each_of(spec)
    reading = each * network.parameters / machine.gpu_bytes
    flops = seconds = 0.0
    for name, entry in spec["tasks"].items():
        sequences = passes(tasks[name], entry["sizes"])
        made = generated_tokens(tasks[name])
        flops += forward_flops(network, sequences * (lengths[name] + made), lengths[name] + made)
        decoded = made * -(-entry["sizes"]["test"] // batch)
        # Every generated token reads all weights once for its batch.
        seconds += TASK + SEQUENCE * sequences + decoded * max(DECODED, reading if gpu else 0.0)
    factor = DRIFT if spec["evaluation"].get("drift", True) else 1.0
    return factor * flops, factor * (seconds + flops / rate)
