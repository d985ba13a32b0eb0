"""Gradient mask: the entries with the largest gradient on the target train, the others stay.

    g = mean over batches of dL/dw at the base;   train where |g| is among the largest

    scope: row      (GPS)   per output row of every matrix the `per_row` largest; biases train
                            whole, norms stay frozen
    scope: overall  (SIFT)  the `density` share that is largest among all entries
    scope: tensor   (SPU)   the `density` share of every tensor by itself

The mask is made once, before training. GPS in the released code sums the gradients of a whole epoch
under a contrastive loss of images; here it is the task's own loss, on `examples` of the training
data. SPU takes only the first MLP matrix of each block; here every tensor of the decoder layers.
The candidates are the decoder layers, as in Full-ST, and masks act as in FISH.
Trained: per_row m for a matrix [m, n] and m for its bias; or density x the candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.selective import tune_all
from ballast.sparse import (
    gradient_scores,
    grouped,
    keep_only,
    largest,
    largest_overall,
    layer_parameters,
    start_of,
)

from .fish import after_backward, after_step, parameter_groups, restored, trained_count  # noqa: F401

declaration = Declaration(
    title="Gradient mask",
    citation="Zhang et al., Gradient-based Parameter Selection for Efficient Fine-Tuning (GPS), "
    "CVPR 2024, arXiv:2312.10136; Song et al., Sparse is Enough in Fine-tuning Pre-trained Large "
    "Language Models (SIFT), ICML 2024, arXiv:2312.11875; Zhang et al., Overcoming Generic "
    "Knowledge Loss with Selective Parameter Update (SPU), CVPR 2024, arXiv:2308.12462",
    family="selective",
    merges=True,
    learning_rate=2e-4,
    learning_rate_source="that of SPIDER's masked baselines: GPS trains image classifiers",
    size="per_row",
)


@dataclass(frozen=True)
class Hyper:
    scope: str = hyper("row", "GPS", choices=("row", "overall", "tensor"))
    per_row: int = hyper(1, "K of GPS; for scope: row", low=1)
    density: float = hyper(0.1, "SPU's selection rate; for the other scopes", low=0.0, high=1.0)
    examples: int = hyper(1024, "chosen here, as FISH has; the papers take an epoch or less", low=1)
    batch: int = hyper(32, "chosen here; of these examples, for speed alone", low=1)


def attach(ctx: Context) -> None:
    tune_all(ctx)
    start_of(ctx)


def calibrate(ctx: Context) -> None:
    batches = grouped(ctx.batches(ctx.hyper.examples), ctx.hyper.batch)
    mean = gradient_scores(ctx, ctx.own(), batches, of=torch.clone)
    sizes = {name: gradient.abs() for name, gradient in mean.items()}
    hyper = ctx.hyper
    if hyper.scope == "overall":
        total = sum(size.numel() for size in sizes.values())
        keep_only(ctx, largest_overall(sizes, max(1, int(hyper.density * total))))
    elif hyper.scope == "tensor":
        masks = {n: largest(s, max(1, int(hyper.density * s.numel()))) for n, s in sizes.items()}
        keep_only(ctx, masks)
    else:
        keep_only(ctx, {n: _rows(n, size, hyper.per_row) for n, size in sizes.items()})


def _rows(name: str, size: Tensor, per_row: int) -> Tensor:
    mask = torch.zeros_like(size, dtype=torch.bool)
    if size.ndim == 1:
        return ~mask if _is_bias(name) else mask
    return mask.scatter_(1, size.topk(min(per_row, size.shape[1]), dim=1).indices, True)


def _is_bias(name: str) -> bool:
    return name.endswith("bias") and "norm" not in name.lower()


def total_parameters(ctx: Context, size: int | None = None) -> int:
    hyper, shapes = ctx.hyper, {n: p.shape for n, p in layer_parameters(ctx).items()}
    if hyper.scope == "row":
        per_row = size or hyper.per_row
        matrices = [s[0] * min(per_row, s[1]) for s in shapes.values() if len(s) == 2]
        return sum(matrices) + sum(s[0] for n, s in shapes.items() if len(s) == 1 and _is_bias(n))
    if size not in (None, hyper.per_row):
        raise SuiteError("budgets: gradient_mask meets one with scope: row only")
    counts = [shape.numel() for shape in shapes.values()]
    if hyper.scope == "overall":
        return max(1, int(hyper.density * sum(counts)))
    return sum(max(1, int(hyper.density * count)) for count in counts)
