"""Bytes that a suite leaves on disk: cells, shared parts, and what stands there for a while."""

from __future__ import annotations

from typing import Any

from ballast.forecast.architecture import Network

FP32 = 4
# A record with its changes; a line of the loss curve; a task's table of items, and one item in it.
RECORD_BYTES, STEP_BYTES, TASK_BYTES, ITEM_BYTES = 30_000, 13, 9_000, 35
# Methods that decompose the base's weights, and whose adapters hold the part that they took away.
DECOMPOSING = {"pissa", "milora", "lora_dash", "spectral_additive", "spectral_rotation",
               "flora_dash", "adalora_dash", "corda", "olora"}  # fmt: skip
# Methods whose adapters hold all weights and a mask of those that train, or both of two parts.
WHOLE = {"fish", "gradient_mask"}
TWICE = {"magnitude_mask", "spider", "lora_fa", "peft_bridge"}


def adapter_bytes(spec: dict[str, Any], network: Network, trainable: float) -> float:
    """Bytes of a finished cell's adapter.safetensors."""
    if spec["family"] == "post-hoc":
        return FP32 * network.stack.parameters + 4_000
    if spec["method"] in WHOLE:
        return 1.04 * FP32 * network.stack.parameters
    twice = 2 if spec["method"] in DECOMPOSING | TWICE else 1
    return FP32 * trainable * twice + 9_000


def other_bytes(spec: dict[str, Any]) -> float:
    """Bytes of a finished cell's other files."""
    steps = 0 if spec["family"] == "post-hoc" else spec["training"]["steps"]
    sizes = [entry["sizes"]["test"] for entry in spec["tasks"].values()]
    items = sum(TASK_BYTES + ITEM_BYTES * size for size in sizes)
    return RECORD_BYTES + STEP_BYTES * steps + items


def checkpoint_bytes(spec: dict[str, Any], trainable: float) -> float:
    """Bytes of a running cell's checkpoint: what trains and both of Adam's moments."""
    return 0.0 if spec["family"] == "post-hoc" else 3 * FP32 * trainable + 10_000


def decomposition_bytes(network: Network, modules: str | list[str]) -> float:
    """Bytes of the singular vectors of the adapted matrices, made once for all cells of a base."""
    shapes = [s for name, s in network.stack.linear.items() if modules == "all" or name in modules]
    return FP32 * network.stack.layers * sum((m + n + 1) * min(m, n) for m, n in shapes)


def feature_bytes(network: Network, images: float, each: int = FP32) -> float:
    """Bytes of a frozen tower's features of images, stored once for all cells of a base."""
    width = network.tower.width if network.tower else 0
    return images * network.image_tokens * width * each
