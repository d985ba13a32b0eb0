"""SPIDER: after every step each weight is mixed with its start, by how much the target needs it.

    I0 = sigmoid(z(|w0|)),   I1 = sigmoid(z(|G|)),   G = sum of the gradients so far
    c  = I1 / (I0 + I1) where I0 < I1, else 0;   c <- min(c / mean(nonzero c), 1)
    after the optimiser's step:   w <- (1 - c) w0 + c w

z(x) = (x - mean x) / std x within one tensor (std with n - 1, as released). Where the pretrained
size outranks the accumulated gradient, the weight returns to its start; elsewhere it is drawn back
by degrees. As in the scripts the last two decoder layers train (`layers`), and the connector where
the variant tunes it (beside the method here, unmixed; the released code mixes it too). A tensor
whose entries are all equal has no z-scores: 0 here, where the code divides by 0. G sums gradients
before clipping. It is as large as what trains, and is stored. Trainable: the chosen layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.selective import parameters_of, tune_layers
from ballast.sparse import start_of, without_decay

from .last_st import chosen

SUM = "gradient_sum."

declaration = Declaration(
    title="SPIDER",
    citation="Huang et al., Learn from Downstream and Be Yourself in Multimodal Large Language "
    "Models Fine-Tuning, ICML 2025, arXiv:2411.10928",
    family="selective",
    merges=True,
    learning_rate=2e-4,
    learning_rate_source="the released script for LLaVA-1.5-7B",
)


@dataclass(frozen=True)
class Hyper:
    layers: float = hyper(
        2, "tune_decoder_layer of the scripts, the last of 32; below 1 a fraction", low=0.0
    )


def attach(ctx: Context) -> None:
    tune_layers(ctx, chosen(ctx))
    start_of(ctx)
    start = ctx.scratch["start"]
    ctx.scratch["importance"] = {name: importance(weight) for name, weight in start.items()}


def initialise(ctx: Context) -> None:
    for name, weight in ctx.scratch["start"].items():
        ctx.state[SUM + name] = torch.zeros_like(weight)


def restored(ctx: Context) -> None:
    for name, p in ctx.own().items():
        ctx.state[SUM + name] = ctx.state[SUM + name].to(p.device)


def parameter_groups(ctx: Context) -> list[dict[str, Any]]:
    return without_decay(ctx)


def after_backward(ctx: Context) -> None:
    for name, p in ctx.own().items():
        if p.grad is not None:
            ctx.state[SUM + name] += p.grad


@torch.no_grad()
def after_step(ctx: Context) -> None:
    for name, p in ctx.own().items():
        share = mixing(ctx.scratch["importance"][name], importance(ctx.state[SUM + name]))
        start = ctx.scratch["start"][name]
        p.copy_(start * (1 - share) + p * share)


@torch.no_grad()
def importance(values: Tensor) -> Tensor:
    """sigmoid(z(|values|)), or zeros for a tensor of zeros."""
    if not values.any():
        return torch.zeros_like(values)
    sizes = values.abs()
    spread = sizes.std() if sizes.numel() > 1 else sizes.new_zeros(())
    score = (sizes - sizes.mean()) / torch.where(spread > 0, spread, 1)
    return score.sigmoid()


@torch.no_grad()
def mixing(pretrained: Tensor, target: Tensor) -> Tensor:
    """c in [0, 1]: the share of the tuned weight that is kept."""
    share = torch.where(pretrained < target, target / (pretrained + target), 0)
    mean = share.sum() / share.count_nonzero().clamp(min=1)
    return (share / torch.where(mean > 0, mean, 1)).clamp(max=1)


def total_parameters(ctx: Context, size: int | None = None) -> int:
    return parameters_of(ctx, chosen(ctx))


@torch.no_grad()
def report(ctx: Context) -> dict[str, float]:
    """Share of the weights that are held at their start after the last step."""
    held = total = 0
    for name, p in ctx.own().items():
        share = mixing(ctx.scratch["importance"][name], importance(ctx.state[SUM + name]))
        held, total = held + int((share == 0).sum()), total + p.numel()
    return {"tuned_layers": len(chosen(ctx)), "held_at_start": held / total}
