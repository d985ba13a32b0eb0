"""Interaction-aware LoRA (Crab): one A, several heads B_i, mixed per token by a router.

    y = W0 x + s sum_i softmax(R x)_i B_i A x,   A [r, n], B_i [m, r], R [N, n], s = alpha / r

The router sees the layer's own input and no task identity; its softmax is dense and in fp32. A and
R start uniform, every B_i at zero, so the tuned model starts as the base. The update depends on the
input, so it cannot be merged into W0. With one head it is LoRA with an idle router.

The paper has three heads (temporal, spatial and pixel cues); its released script sets one, which
is LoRA, and is not followed. The layer is HydraLoRA's. The code's balance term is commented out;
it is an option here (see `moe_lora`). The code's dropout 0.05 is 0 here as in LoRA. Trainable per
matrix: r n + N r m + N n.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.experts import (
    attach_experts,
    balance_penalty,
    expert_parameters,
    forget_loads,
    head_use,
    start_experts,
)

declaration = Declaration(
    title="Interaction-aware LoRA (Crab)",
    citation="Du et al., Crab: A Unified Audio-Visual Scene Understanding Model with Explicit "
    "Cooperation, CVPR 2025, arXiv:2503.13068",
    family="reparameterization",
    rank="inner dimension r of the shared A and of every B_i",
    merges=False,
    random_start=True,
    learning_rate=1e-4,
    learning_rate_source="the released script for LLaMA-2-7B",
)


@dataclass(frozen=True)
class Hyper:
    heads: int = hyper(3, "temporal, spatial, pixel (paper); the released script has 1", low=1)
    alpha_over_r: float = hyper(2.0, "r 8, alpha 16 (released script)", low=0.0)
    dropout: float = hyper(
        0.0, "that of LoRA here; the released script has 0.05", low=0.0, high=0.99
    )
    balance: float = hyper(0.0, "commented out in the released code", low=0.0)


def attach(ctx: Context) -> None:
    attach_experts(ctx, ctx.hyper.heads, shared=True)


def initialise(ctx: Context) -> None:
    start_experts(ctx)


def penalty(ctx: Context) -> Tensor | None:
    return balance_penalty(ctx)


def after_backward(ctx: Context) -> None:
    forget_loads(ctx)


def report(ctx: Context) -> dict[str, float]:
    return head_use(ctx)


def total_parameters(ctx: Context, rank: int) -> int:
    return expert_parameters(ctx, ctx.targets, rank, ctx.hyper.heads, shared=True)
