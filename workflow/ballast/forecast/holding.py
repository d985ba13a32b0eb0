"""What a method holds in memory and leaves on disk, as a footprint says it or its name lets guess.

A footprint is measured on a miniature of the base (`footprint`), in a process that may take some
seconds; whoever cannot wait for it guesses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ballast.forecast.architecture import Network
from ballast.forecast.memory import activation_bytes
from ballast.forecast.trainable import held_guess

FP32 = 4
# Methods that store as much again beside what trains: what they took away from the base, or froze.
TWICE = {"pissa", "milora", "olora", "corda", "lora_dash", "flora_dash", "adalora_dash",
         "spectral_additive", "lora_fa", "spider", "peft_bridge"}  # fmt: skip
# Methods that ask for the singular vectors of the matrices that they adapt.
DECOMPOSING = {"pissa", "milora", "lora_dash", "flora_dash", "adalora_dash", "spectral_additive",
               "spectral_rotation"}  # fmt: skip
# Copies of what trains that methods keep beside it, in the base's precision; and their masks.
COPYING = {"fish", "gradient_mask", "magnitude_mask", "l2_sp", "spider"}
MASKED = {"fish", "gradient_mask", "magnitude_mask"}
# A tensor of weights' size, in fp32, for every matrix.
WEIGHING = {"lorasculpt", "clora"}


# Gradients of the frozen matrices, summed in fp32, before anything trains.
SCORING = {"spa", "rosa"}


@dataclass(frozen=True)
class Footprint:
    """Of a method on a base.

    held: numbers in the parameters that train, masked ones included: each has a gradient and two
    moments. stored: bytes of the finished adapter's tensors; tensors: how many they are. beside:
    bytes of what the method keeps beside the base and what trains. activations: bytes that the
    layers keep of a token for the backward pass; copies: bytes that they keep of weights. start:
    the most bytes beside the base that the method holds before the first step.
    decomposed: bytes of the singular vectors of base weights that the method asks for; decomposing:
    operations of computing them.
    """

    held: float
    stored: float
    tensors: float
    beside: float
    activations: float
    copies: float
    start: float
    decomposed: float
    decomposing: float


def footprint_guess(spec: dict[str, Any], network: Network, trained: float) -> Footprint:
    """Of a method that has not been looked at, from the count that it trains."""
    each = FP32 if spec["training"]["precision"] == "fp32" else 2
    method, held = spec["method"], held_guess(spec, network, trained)
    stored = FP32 * held * (2 if method in TWICE else 1) + held / 8 * (method in MASKED)
    copied = each * held * (method in COPYING) + 1.125 * held * (method in MASKED)
    weighed = FP32 * network.stack.matrices * (method in WEIGHING)
    decomposed, decomposing = decomposition(network) if method in DECOMPOSING else (0.0, 0.0)
    return Footprint(
        held=held,
        stored=stored,
        tensors=2 * len(network.stack.linear) * network.stack.layers,
        beside=copied + weighed,
        activations=network.stack.layers * activation_bytes(network, each),
        # Autocast keeps what trains in the base's precision too.
        copies=each * held if each != FP32 else 0.0,
        start=_start_guess(spec, network, held),
        decomposed=decomposed,
        decomposing=decomposing,
    )


def _start_guess(spec: dict[str, Any], network: Network, held: float) -> float:
    """Bytes of gradients of weights, their sums and means, or of inputs' covariances."""
    each = FP32 if spec["training"]["precision"] == "fp32" else 2
    if spec["method"] in SCORING:
        return (2 * FP32 + each) * network.stack.matrices
    if spec["method"] == "corda":
        return FP32 * network.stack.layers * sum(n * n for _, n in network.stack.linear.values())
    return FP32 * held


def decomposition(network: Network) -> tuple[float, float]:
    """Bytes of the singular vectors of all matrices, and operations of computing them."""
    shapes, layers = network.stack.linear.values(), network.stack.layers
    return (
        layers * FP32 * sum((m + n + 1) * min(m, n) for m, n in shapes),
        layers * 14 * sum(m * n * min(m, n) for m, n in shapes),
    )
