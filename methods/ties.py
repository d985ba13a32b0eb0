"""TIES-Merging: trim each task's change, agree on a sign per entry, average those that agree.

    trim    d_t = theta_t - theta0, only its `keep` share of largest |entries|, the rest 0
    elect   gamma = sgn(sum_t d_t), per entry; where the sum is 0, the sign that most entries have
    merge   d = mean over {t: sgn(d_t) = gamma} of d_t;   theta = theta0 + scale d

The trim is over all the weights that any parent changed, together, as in the released code, which
ranks the whole model; entries as large as the smallest that is kept are kept too. Only entries that
are not 0 count in the mean. With one parent it is magnitude trimming. Nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ballast.context import PostHoc
from ballast.declare import Declaration, hyper
from ballast.merging import changed_names, deltas_of, with_delta

declaration = Declaration(
    title="TIES-Merging",
    citation="Yadav et al., TIES-Merging: Resolving Interference When Merging Models, "
    "NeurIPS 2023, arXiv:2306.01708",
    family="post-hoc",
    merges=True,
    unchanged_at_start=False,
    parents=("full_st",),
    several_targets=True,
)


@dataclass(frozen=True)
class Hyper:
    keep: float = hyper(0.2, "the top 20 % (paper)", low=0.0, high=1.0)
    scale: float = hyper(1.0, "lambda without held-out data; 0.3 to 1 tuned (paper)", low=0.0)


def post_hoc(ctx: PostHoc) -> dict[str, Tensor]:
    names = changed_names(ctx)
    limits = torch.stack([_limit(ctx, parent, names) for parent in range(len(ctx.tuned))])
    majority = torch.stack([_elected(ctx, name, limits).sum() for name in names]).sum().sign()
    merged = {}
    for name in names:
        deltas = _trimmed(ctx, name, limits)
        sign = deltas.sum(0).sign()
        sign = torch.where(sign == 0, majority, sign)
        agreeing = (deltas != 0) & (deltas.sign() == sign)
        mean = (deltas * agreeing).sum(0) / agreeing.sum(0).clamp_min(1)
        merged[name] = with_delta(ctx, name, ctx.hyper.scale * mean)
    return merged


def _limit(ctx: PostHoc, parent: int, names: list[str]) -> Tensor:
    """The smallest size that a parent keeps, infinite if it keeps nothing."""
    sizes = torch.cat([deltas_of(ctx, name)[parent].abs().flatten() for name in names])
    keep = round(ctx.hyper.keep * sizes.numel())
    if keep == 0:
        return torch.tensor(float("inf"), dtype=sizes.dtype)
    return sizes.kthvalue(sizes.numel() - keep + 1).values


def _trimmed(ctx: PostHoc, name: str, limits: Tensor) -> Tensor:
    deltas = deltas_of(ctx, name)
    return deltas * (deltas.abs() >= limits.view(-1, *[1] * (deltas.ndim - 1)))


def _elected(ctx: PostHoc, name: str, limits: Tensor) -> Tensor:
    return _trimmed(ctx, name, limits).sum(0).sign()
