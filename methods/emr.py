"""EMR-Merging: one unified change for all tasks, and per task a mask and a rescaler.

    d_t = theta_t - theta0
    elect    tau = sgn(mean_t d_t) o max over {t: sgn(d_t) = sgn(mean)} of |d_t|
    mask     M_t = 1[d_t o tau > 0]
    rescale  lambda_t = sum |d_t| / sum |M_t o tau|,  sums over all weights of the model
    theta_t = theta0 + lambda_t M_t o tau

Nothing is trained and nothing is tuned. The model of the cell is that of its own target: its mask
and rescaler on the change that all targets' parents share. With one parent it is that parent.

The paper's formulas are implemented; the released code differs in lambda, which it takes as a ratio
of sums of *means* per tensor, so that a norm weighs as much as a matrix, and in counting a mean of
exactly 0 as negative, where sgn(0) = 0 leaves the base here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ballast.context import PostHoc
from ballast.declare import Declaration
from ballast.merging import changed_names, deltas_of, with_delta

declaration = Declaration(
    title="EMR-Merging",
    citation="Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging, "
    "NeurIPS 2024, arXiv:2405.17461",
    family="post-hoc",
    merges=True,
    unchanged_at_start=False,
    parents=("full_st",),
    several_targets=True,
)


def post_hoc(ctx: PostHoc) -> dict[str, Tensor]:
    names = changed_names(ctx)
    parts = {name: _masked(deltas_of(ctx, name), ctx.own) for name in names}
    original = sum(deltas_of(ctx, name)[ctx.own].abs().sum() for name in names)
    masked = sum(part.abs().sum() for part in parts.values())
    rescaler = original / masked if masked else torch.ones(())
    return {name: with_delta(ctx, name, rescaler * part) for name, part in parts.items()}


def _masked(deltas: Tensor, own: int) -> Tensor:
    """M o tau of the task `own` from the changes [tasks, *shape] of all."""
    sign = deltas.mean(0).sign()
    agreeing = torch.where(deltas.sign() == sign, deltas.abs(), 0.0)
    unified = sign * agreeing.amax(0)
    return unified * (deltas[own] * unified > 0)
