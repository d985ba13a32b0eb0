"""L2-SP: Full-ST drawn back to its starting point.

    L = L_task + (alpha / 2) sum (theta - theta0)^2

over the parameters that Full-ST trains (a connector tuned beside them is left alone, as the paper
leaves the new head to plain decay). The sum is the paper's. The NRCA scripts use the *mean* over
trainable tensors of the mean squared difference, times 1e-3: smaller by about the number of
parameters, and without effect at their own sizes. theta0 is kept beside theta. Trainable: all
parameters of the decoder layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.selective import copies, tune_all

declaration = Declaration(
    title="L2-SP",
    citation="Li, Grandvalet and Davoine, Explicit Inductive Bias for Transfer Learning with "
    "Convolutional Networks, ICML 2018, arXiv:1802.01483",
    family="selective",
    merges=True,
    learning_rate=2e-5,
    learning_rate_source="that of Full-ST",
)


@dataclass(frozen=True)
class Hyper:
    alpha: float = hyper(
        0.1,
        "chosen here: the paper selects it by cross-validation for each target, on a grid of "
        "powers of ten up to 1",
        low=0.0,
    )


def attach(ctx: Context) -> None:
    tune_all(ctx)
    ctx.scratch["start"] = copies(ctx)


def penalty(ctx: Context) -> Tensor:
    start = ctx.scratch["start"]
    # fp32 sums: squares of small differences vanish in bf16.
    squares = [(p - start[name]).float().square().sum() for name, p in ctx.own().items()]
    return 0.5 * ctx.hyper.alpha * torch.stack(squares).sum()


@torch.no_grad()
def report(ctx: Context) -> dict[str, float]:
    start = ctx.scratch["start"]
    squares = [(p - start[name]).double().square().sum() for name, p in ctx.own().items()]
    return {"distance_from_start": float(torch.stack(squares).sum().sqrt())}
