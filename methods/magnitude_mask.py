"""Magnitude mask: the entries that are largest in size stay frozen, the others train.

    per tensor: freeze the int(freeze N) entries with the largest |w0|, train the rest

SPIDER's baseline, after magnitude pruning (Han et al. 2015): what is large in the pretrained weight
is taken to carry what it knows. `criterion: random` freezes as many entries drawn at random, the
paper's control. As in SPIDER's scripts the last decoder layers are the candidates, each tensor by
itself, norms included. The released code masks the update only, after each step; here gradients are
masked too, so that frozen entries count neither in the clipped norm nor in Adam's moments.
Trained: sum over tensors of N - int(freeze N).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.selective import tune_layers
from ballast.sparse import keep_only, largest, layer_parameters, start_of

from .fish import after_backward, after_step, parameter_groups, restored, trained_count  # noqa: F401
from .last_st import chosen

declaration = Declaration(
    title="Magnitude mask",
    citation="baseline of Huang et al., Learn from Downstream and Be Yourself in Multimodal Large "
    "Language Models Fine-Tuning (SPIDER), ICML 2025, arXiv:2411.10928",
    family="selective",
    merges=True,
    learning_rate=2e-4,
    learning_rate_source="SPIDER's scripts, for two decoder layers",
)


@dataclass(frozen=True)
class Hyper:
    freeze: float = hyper(0.5, "MASK_RATIO of the released code", low=0.0, high=0.99)
    criterion: str = hyper("magnitude", "MagnitudeMask", choices=("magnitude", "random"))
    layers: float = hyper(
        2, "tune_decoder_layer of the scripts, the last of 32; below 1 a fraction", low=0.0
    )


def attach(ctx: Context) -> None:
    tune_layers(ctx, chosen(ctx))
    start_of(ctx)


def initialise(ctx: Context) -> None:
    keep_only(
        ctx,
        {
            name: ~largest(_scores(ctx, p), int(ctx.hyper.freeze * p.numel()))
            for name, p in ctx.own().items()
        },
    )


def _scores(ctx: Context, parameter: Tensor) -> Tensor:
    if ctx.hyper.criterion == "magnitude":
        return parameter.detach().abs()
    return torch.rand(parameter.shape, generator=ctx.generator).to(parameter.device)


def total_parameters(ctx: Context, size: int | None = None) -> int:
    prefixes = tuple(f"{name}." for name in chosen(ctx))
    counts = [p.numel() for n, p in layer_parameters(ctx).items() if n.startswith(prefixes)]
    return sum(count - int(ctx.hyper.freeze * count) for count in counts)
