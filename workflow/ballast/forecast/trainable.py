"""How many numbers a method trains on a base, before it has run.

A finished cell has counted; before that a method of the low-rank family is taken for LoRA at its
rank, the selective ones for their share of the layers, and whatever has neither for little.
"""

from __future__ import annotations

from typing import Any

from ballast.forecast.architecture import Network

# Share of the base's layers that selective methods train where they do not train all.
SHARES = {
    "last_st": 0.25,
    "top_st": 0.25,
    "fish": 0.005,
    "gradient_mask": 0.1,
    "magnitude_mask": 1 / 3,
}
# Share of the layers that a method trains that has neither a rank nor weights of the base.
SMALL = 0.02


def trainable_guess(spec: dict[str, Any], network: Network) -> float:
    """Trainable parameters of a cell, roughly: within a factor of two for nearly all methods."""
    family, name = spec["family"], spec["method"]
    if family == "post-hoc":
        return 0.0
    connector = network.connector_parameters if spec["connector"] == "tuned" else 0
    if name == "connector_st":
        return network.connector_parameters
    if family == "selective":
        return connector + network.stack.parameters * SHARES.get(name, 1.0)
    if "budget" in spec:
        from ballast.budget import parameters_within

        return connector + parameters_within(spec["budget"], network.parameters)
    if not spec["rank"]:
        return connector + SMALL * network.stack.parameters
    return connector + spec["rank"] * low_rank_sides(network, spec["modules"])


def low_rank_sides(network: Network, modules: str | list[str]) -> int:
    """Sum of m + n over the adapted matrices [m, n]: what LoRA trains for each rank."""
    stack = network.stack
    chosen = [
        shape
        for name, shape in stack.linear.items()
        if modules == "all" or name in modules or not name.endswith("_proj")
    ]
    return stack.layers * sum(m + n for m, n in chosen)


def held_guess(spec: dict[str, Any], network: Network, trained: float) -> float:
    """Numbers in the parameters that train, those that a mask holds still included, roughly."""
    if spec["method"] in ("fish", "gradient_mask"):
        return network.stack.parameters
    if spec["method"] == "magnitude_mask":
        freeze = (spec.get("hyper") or {}).get("freeze", 0.5)
        return trained / (1 - freeze)
    return trained
