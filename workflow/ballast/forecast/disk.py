"""Bytes that a suite leaves on disk: cells, shared parts, and what stands there for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ballast.forecast.architecture import Network

if TYPE_CHECKING:
    from ballast.forecast.holding import Footprint

FP32 = 4
# A record with its changes; a line of the loss curve; a task's table of items, and one item in it.
RECORD_BYTES, STEP_BYTES, TASK_BYTES, ITEM_BYTES = 30_000, 13, 9_000, 35
# Of an adapter's file: the cell's spec, and a tensor's name and shape.
ABOUT_BYTES, TENSOR_BYTES = 4_000, 105


def adapter_bytes(spec: dict[str, Any], network: Network, footprint: Footprint) -> float:
    """Bytes of a finished cell's adapter.safetensors."""
    if spec["family"] == "post-hoc":
        # Merged weights, in the base's precision.
        return each_of(spec) * network.stack.parameters + ABOUT_BYTES
    return footprint.stored + ABOUT_BYTES + TENSOR_BYTES * footprint.tensors


def each_of(spec: dict[str, Any]) -> int:
    """Bytes of a number of the base in a cell's precision."""
    return FP32 if spec["training"]["precision"] == "fp32" else 2


def other_bytes(spec: dict[str, Any]) -> float:
    """Bytes of a finished cell's other files."""
    steps = 0 if spec["family"] == "post-hoc" else spec["training"]["steps"]
    sizes = [entry["sizes"]["test"] for entry in spec["tasks"].values()]
    items = sum(TASK_BYTES + ITEM_BYTES * size for size in sizes)
    return RECORD_BYTES + STEP_BYTES * steps + items


def checkpoint_bytes(spec: dict[str, Any], footprint: Footprint) -> float:
    """Bytes of a running cell's checkpoint: what it stores, and Adam's moments of what trains."""
    if spec["family"] == "post-hoc":
        return 0.0
    return footprint.stored + 2 * FP32 * footprint.held + 10_000


def feature_bytes(network: Network, images: float, each: int) -> float:
    """Bytes of a frozen tower's features of images in the base's precision, `each` a number."""
    width = network.tower.width if network.tower else 0
    return images * network.image_tokens * width * each
