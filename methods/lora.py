"""LoRA: a frozen weight plus a trained product of two thin matrices.

    y = W0 x + s B A x,   A [r, n], B [m, r],   s = alpha / r

A starts uniform (kaiming, a = sqrt 5) and B at zero, so the tuned model starts as the base. The
paper's text names a Gaussian for A; its code (loralib/layers.py) and PEFT draw the kaiming uniform,
which is implemented here. Trainable per matrix: r (m + n).
"""

from __future__ import annotations

from dataclasses import dataclass

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.lowrank import attach_low_rank, start_kaiming

declaration = Declaration(
    title="LoRA",
    citation="Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022, "
    "arXiv:2106.09685",
    family="reparameterization",
    rank="inner dimension r of B A",
    merges=True,
    random_start=True,
    learning_rate=2e-4,
    learning_rate_source="within the 1e-4 to 5e-4 used for language models, e.g. by LLM-Adapters",
)


@dataclass(frozen=True)
class Hyper:
    alpha_over_r: float = hyper(
        2.0, "alpha = 2r, so that s does not fall with the rank (LLM-Adapters)", low=0.0
    )
    dropout: float = hyper(0.0, "loralib's default", low=0.0, high=0.99)


def attach(ctx: Context) -> None:
    attach_low_rank(ctx, scale=ctx.hyper.alpha_over_r, dropout=ctx.hyper.dropout)


def initialise(ctx: Context) -> None:
    start_kaiming(ctx)


def parameter_count(m: int, n: int, rank: int) -> int:
    return rank * (m + n)
