"""LoRA with weight decay: LoRA whose factors are pulled to zero, and so the model to its base.

    A <- (1 - eta lambda) A,   B <- (1 - eta lambda) B   beside every step of AdamW (decoupled)

At B A = 0 the model is the base, so decay of the *factors* is a pull towards the base, at no cost;
lambda between 0.2 and 0.3 is a strong baseline for stability. It takes the place of the suite's
weight decay for the adapter. lambda lies in [0, 1]: the pull is eta lambda per step, so that at
2e-4 a lambda of 1 halves a factor in 3,500 steps; above it the decay, not the task, sets the
result. Everything else is LoRA. Trainable per matrix: r (m + n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ballast.context import Context
from ballast.declare import Declaration, hyper

from .lora import attach, initialise, parameter_count  # noqa: F401

declaration = Declaration(
    title="LoRA + weight decay",
    citation="Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019, "
    "arXiv:1711.05101, on Hu et al., LoRA, ICLR 2022, arXiv:2106.09685",
    family="reparameterization",
    rank="inner dimension r of B A",
    merges=True,
    random_start=True,
    learning_rate=2e-4,
    learning_rate_source="that of LoRA, from which it differs by its decay alone",
)


@dataclass(frozen=True)
class Hyper:
    alpha_over_r: float = hyper(2.0, "alpha = 2r, as for LoRA", low=0.0)
    dropout: float = hyper(0.0, "that of LoRA here", low=0.0, high=0.99)
    weight_decay: float = hyper(
        0.25, "middle of the 0.2 to 0.3 reported as a strong stability baseline", low=0.0, high=1.0
    )


def parameter_groups(ctx: Context) -> list[dict[str, Any]]:
    return [{"params": list(ctx.own()), "weight_decay": ctx.hyper.weight_decay}]
