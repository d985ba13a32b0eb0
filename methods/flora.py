"""FLoRA (Si et al.): the update lives in a small core between two trained bases.

    y = W0 x + s B G A x,   A [r, n], G [r, r], B [m, r],   s = alpha / r

G starts at zero, so the tuned model starts as the base, and at first only G has a gradient; A and B
start random and span an r-dimensional space on both sides, in which G is free. Not "Flora"
(gradient compression, arXiv:2402.03293) and not federated FLoRA.

The authors released three starts of A and B: kaiming uniform with a = sqrt 5 (for language models,
with s = alpha / r; the default here), N(0, 0.02) (for GLUE; `start: gaussian`), and kaiming normal
over r (vision layers, with s = 4), which is not offered: its entries of about 1 / sqrt(2 r) do not
shrink with the width. The N-dimensional form for convolutions is this one on matrices. The step
costs LoRA's plus m r^2 for B G, formed once per forward, so that no further tensor of tokens is
kept. Trainable per matrix: r (m + n) + r^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ballast.adapters import LowRank
from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.lowrank import attach_low_rank

declaration = Declaration(
    title="FLoRA",
    citation="Si et al., FLoRA: Low-Rank Core Space for N-dimension, 2024, arXiv:2405.14739",
    family="reparameterization",
    rank="side r of the core G",
    merges=True,
    random_start=True,
    learning_rate=2e-4,
    learning_rate_source="the authors' script for LLaMA-7B (Subspace-Tuning)",
)


@dataclass(frozen=True)
class Hyper:
    alpha_over_r: float = hyper(2.0, "alpha = 2r, as for LoRA (the authors' scripts)", low=0.0)
    dropout: float = hyper(0.0, "that of LoRA here", low=0.0, high=0.99)
    start: str = hyper(
        "kaiming",
        "the authors' code for language models; gaussian: theirs for GLUE",
        choices=("kaiming", "gaussian"),
    )


class Core(LowRank):
    """LowRank with a core: s B G A."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank, scale, dropout)
        self.G = nn.Parameter(torch.zeros_like(self.A[:, :1]).expand(rank, rank).contiguous())

    def up(self) -> Tensor:
        """B G [m, r]."""
        return self.B @ self.G


def attach(ctx: Context) -> None:
    attach_low_rank(ctx, scale=ctx.hyper.alpha_over_r, dropout=ctx.hyper.dropout, layer=Core)


@torch.no_grad()
def initialise(ctx: Context) -> None:
    for _, layer in ctx.adapters():
        for factor in (layer.A, layer.B):
            start = torch.empty(factor.shape, dtype=factor.dtype)
            if ctx.hyper.start == "kaiming":
                nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=ctx.generator)
            else:
                nn.init.normal_(start, std=0.02, generator=ctx.generator)
            factor.copy_(start)
        layer.G.zero_()


def parameter_count(m: int, n: int, rank: int) -> int:
    return rank * (m + n) + rank**2
