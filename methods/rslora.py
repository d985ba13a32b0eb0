"""rsLoRA: LoRA with a scale that keeps its step from shrinking with the rank.

y = W0 x + s B A x,   s = alpha / sqrt(r)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.lowrank import attach_low_rank

from .lora import initialise, parameter_count  # noqa: F401

declaration = Declaration(
    title="rsLoRA",
    citation="Kalajdzievski, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023, "
    "arXiv:2312.03732",
    family="reparameterization",
    rank="inner dimension r of B A",
    merges=True,
    random_start=True,
    learning_rate=2e-4,
    learning_rate_source="that of LoRA: the paper compares the two at one rate",
)


@dataclass(frozen=True)
class Hyper:
    alpha: float = hyper(
        8.0, "s = 2 at r = 16, where it then equals LoRA's; PEFT's default", low=0.0
    )
    dropout: float = hyper(0.0, "loralib's default", low=0.0, high=0.99)


def attach(ctx: Context) -> None:
    assert ctx.rank is not None
    scale = ctx.hyper.alpha / math.sqrt(ctx.rank)
    attach_low_rank(ctx, scale=scale, dropout=ctx.hyper.dropout)
