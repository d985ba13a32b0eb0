"""WiSE-FT: the straight line between the base and a tuned model.

    theta = (1 - alpha) theta0 + alpha theta_tuned

alpha 0 is the base, alpha 1 the parent, both to the bit. Nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ballast.context import PostHoc
from ballast.declare import Declaration, hyper

declaration = Declaration(
    title="WiSE-FT",
    citation="Wortsman et al., Robust Fine-Tuning of Zero-Shot Models, CVPR 2022, arXiv:2109.01903",
    family="post-hoc",
    merges=True,
    unchanged_at_start=False,
    parents=("full_st",),
)


@dataclass(frozen=True)
class Hyper:
    alpha: float = hyper(0.5, "the paper's recommendation without held-out data", low=0.0, high=1.0)


def post_hoc(ctx: PostHoc) -> dict[str, Tensor]:
    alpha = ctx.hyper.alpha
    mixed = {}
    for name, tuned in ctx.only().items():
        base = ctx.base[name]
        mixed[name] = ((1 - alpha) * base.double() + alpha * tuned.double()).to(base.dtype)
    return mixed
