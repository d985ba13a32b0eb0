"""Memory of a cell at its peak: of its process on the host, and of its GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ballast.forecast.architecture import Network

# Python with torch, transformers and lm-eval loaded; and what CUDA's libraries add on the host.
PROCESS_MB, CUDA_HOST_MB = 600.0, 2500.0
# CUDA's context, kernels and the allocator's unused blocks on the GPU: a part, and a share.
CUDA_MB, LOOSE = 700.0, 1.08
FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Peaks in MB. `device_mb` is of the GPU, 0 on a CPU, where all of it is the host's."""

    host_mb: float
    device_mb: float
    parts: dict[str, float]  # MB by what holds them, of the phase with the higher peak


def peak(
    spec: dict[str, Any],
    network: Network,
    trainable: float,
    length: float,
    gpu: bool,
    scored_length: float | None = None,
) -> Memory:
    """Memory of a cell.

    length: tokens of the longest training example; scored_length: of the longest item.
    """
    training, family = spec["training"], spec["family"]
    each = FP32 if training["precision"] == "fp32" else 2
    seen = network.parameters - network.tower_parameters  # towers leave: their features are stored
    weights = each * seen
    held = dict.fromkeys(("weights", "gradients", "moments", "activations", "logits"), 0.0)
    held["weights"] = weights
    if family != "post-hoc":
        # What trains is kept in fp32: weights of the base that are raised, or adapters beside them.
        raised = (FP32 - each) if family == "selective" else FP32
        held["weights"] += raised * trainable
        held["gradients"] = FP32 * trainable
        held["moments"] = 2 * FP32 * trainable
        tokens = training["batch_size"] * length
        layer = activation_bytes(network, length, each)
        layers = network.stack.layers
        if training["gradient_checkpointing"]:
            kept = each * network.stack.width * layers + layer
        else:
            kept = layer * layers
        held["activations"] = tokens * kept
        # The logits, their gradient, and both again in fp32 at scored positions.
        held["logits"] = tokens * network.vocabulary * (2 * each + FP32)
    scored = scored_length or length
    rows = spec["evaluation"]["batch_size"] * scored
    # All logits, and their log-softmax in fp32; one layer's activations.
    scoring = rows * network.vocabulary * (each + 2 * FP32) + rows * activation_bytes(
        network, scored, each
    )
    evaluating = {"weights": weights, "logits": scoring}
    parts = held if sum(held.values()) >= sum(evaluating.values()) else evaluating
    parts = {name: size / 1e6 for name, size in parts.items() if size}
    total = sum(parts.values())
    if family == "post-hoc":
        # Copies of the base and of one parent's changed weights on the CPU.
        host = PROCESS_MB + total + 2 * FP32 * network.stack.parameters / 1e6
        return Memory(
            host + (CUDA_HOST_MB if gpu else 0), CUDA_MB + LOOSE * total if gpu else 0, parts
        )
    if gpu:
        stored = 3 * FP32 * trainable / 1e6  # a checkpoint on its way to disk
        host = PROCESS_MB + CUDA_HOST_MB + max(each * network.parameters / 1e6, stored)
        return Memory(host, CUDA_MB + LOOSE * total, parts)
    return Memory(PROCESS_MB + total, 0.0, parts)


def activation_bytes(network: Network, length: float, each: int) -> float:
    """Bytes that one layer keeps of one token for the backward pass.

    Inputs of the norms and of every matrix, the gate's and the non-linearity's, queries, keys and
    values; attention is computed without its matrix of weights (fused kernels).
    """
    stack = network.stack
    gated = 4 if "gate_proj" in stack.linear else 2
    return each * (9 * stack.width + gated * stack.inner)
