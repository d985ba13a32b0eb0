"""Memory of a cell at its peak: of its process on the host, and of its GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ballast.forecast.architecture import Network
from ballast.forecast.disk import checkpoint_bytes, each_of

if TYPE_CHECKING:
    from ballast.forecast.holding import Footprint

# Python with torch, transformers and lm-eval loaded; and what CUDA's libraries add on the host.
PROCESS_MB, CUDA_HOST_MB = 570.0, 2500.0
# CUDA's context, kernels and the allocator's unused blocks on the GPU: a part, and a share.
CUDA_MB, LOOSE = 700.0, 1.08
FP32 = 4


@dataclass(frozen=True)
class Scored:
    """Tokens of the longest item of a task that is scored, and those generated for it."""

    length: float
    generated: float


@dataclass(frozen=True)
class Memory:
    """Peaks in MB. `device_mb` is of the GPU, 0 on a CPU, where all of it is the host's."""

    host_mb: float
    device_mb: float
    parts: dict[str, float]  # MB by what holds them, of the phase with the higher peak
    host_parts: dict[str, float]  # the same of the process on the host


def peak(
    spec: dict[str, Any],
    network: Network,
    footprint: Footprint,
    length: float,
    gpu: bool,
    scored: Sequence[Scored] = (),
    features: float = 0.0,
) -> Memory:
    """Memory of a cell.

    length: tokens of the longest training example; scored: tasks that are scored; features: bytes
    of the training images' stored features.
    """
    family, each = spec["family"], each_of(spec)
    weights = each * (network.parameters - network.tower_parameters)  # features replace the tower
    parts = {"weights": weights}
    if family != "post-hoc":
        parts = _training(spec, network, footprint, length)
    for task in scored:
        evaluating = {"weights": weights} | _scoring(spec, network, task)
        parts = max(parts, evaluating, key=lambda held: sum(held.values()))
    parts = {name: size / 1e6 for name, size in parts.items() if size}
    total = sum(parts.values())
    # Features are read as stored, and once more as the precision or a mixture's order wants them.
    host = {"process": PROCESS_MB, "features": 2 * features / 1e6}
    if gpu:
        host["process"] += CUDA_HOST_MB
    else:
        host |= parts
    if family == "post-hoc":
        # The base, copies of it and of one parent's changed weights, on the CPU.
        host["copies"] = (total if gpu else 0.0) + 2 * FP32 * network.stack.parameters / 1e6
    elif gpu:
        # On their way to the device, or from it to a checkpoint.
        passing = {
            "weights": each * network.parameters / 1e6,
            "checkpoint": checkpoint_bytes(spec, footprint) / 1e6,
        }
        largest = max(passing, key=passing.__getitem__)
        host[largest] = passing[largest]
    device = CUDA_MB + LOOSE * total if gpu else 0.0
    return Memory(sum(host.values()), device, parts, host)


def _training(
    spec: dict[str, Any], network: Network, footprint: Footprint, length: float
) -> dict[str, float]:
    """Bytes by what holds them at the highest peak: of the passes, the optimiser's, the start's."""
    training, each, held = spec["training"], each_of(spec), footprint.held
    # What trains is kept in fp32: weights of the base that are raised, or adapters beside them.
    raised = (FP32 - each) if spec["family"] == "selective" else FP32
    weights = each * (network.parameters - network.tower_parameters) + raised * held
    parts = {"weights": weights, "gradients": FP32 * held, "moments": 2 * FP32 * held}
    parts["method"] = footprint.beside
    tokens, layers = training["batch_size"] * length, network.stack.layers
    kept = footprint.activations
    if training["gradient_checkpointing"]:
        kept = each * network.stack.width * layers + kept / layers
    # The logits, their gradient, and both again in fp32 at scored positions.
    logits = tokens * network.vocabulary * (2 * each + FP32)
    passes = {"activations": tokens * kept + footprint.copies, "logits": logits}
    # All tensors are stepped at once (foreach), through a copy of what trains.
    step = {"optimiser": FP32 * held}
    steps = parts | max(passes, step, key=lambda held: sum(held.values()))
    start = {"weights": weights - raised * held, "start": footprint.start}
    return max(steps, start, key=lambda held: sum(held.values()))


def _scoring(spec: dict[str, Any], network: Network, task: Scored) -> dict[str, float]:
    """Bytes of scoring a batch: keys and values of every layer, and logits or one layer's pass."""
    each = each_of(spec)
    rows = spec["evaluation"]["batch_size"] * task.length
    made = spec["evaluation"]["batch_size"] * task.generated
    # All logits, and their log-softmax in fp32; of a generation only the last position's.
    logits = 0.0 if task.generated else rows * network.vocabulary * (each + 2 * FP32)
    layer = rows * activation_bytes(network, each)
    cached = 0.0
    if network.kind != "masked":
        keys = network.stack.linear["k_proj"][0]
        cached = 2 * network.stack.layers * keys * each * (rows + made)
    return {"logits": logits + layer, "keys and values": cached}


def activation_bytes(network: Network, each: int) -> float:
    """Bytes that one layer keeps of one token for the backward pass.

    Inputs of the norms and of every matrix, the gate's and the non-linearity's, queries, keys and
    values; attention is computed without its matrix of weights (fused kernels). Norms compute, and
    keep, in fp32 whatever the precision.
    """
    stack = network.stack
    gated = 4 if "gate_proj" in stack.linear else 2
    in_fp32 = 4 * (FP32 - each) * stack.width
    return each * (9 * stack.width + gated * stack.inner) + in_fp32
