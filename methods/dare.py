"""DARE: drop most of what tuning changed, and rescale the rest.

    delta = theta_tuned - theta0;   m ~ Bernoulli(1 - p);   theta = theta0 + m o delta / (1 - p)

The expectation over the masks is the tuned model. Nothing is trained; the cell's seed draws the
masks, tensor by tensor in the order of their names.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ballast.context import PostHoc
from ballast.declare import Declaration, hyper

declaration = Declaration(
    title="DARE",
    citation="Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous "
    "Models as a Free Lunch, ICML 2024, arXiv:2311.03099",
    family="post-hoc",
    merges=True,
    unchanged_at_start=False,
    random_start=True,
    parents=("full_st",),
)


@dataclass(frozen=True)
class Hyper:
    drop: float = hyper(0.9, "p, typical for language models (paper)", low=0.0, high=0.999)


def post_hoc(ctx: PostHoc) -> dict[str, Tensor]:
    keep = 1 - ctx.hyper.drop
    edited = {}
    for name, tuned in sorted(ctx.only().items()):
        base = ctx.base[name].double()  # the difference of two fp32 numbers is exact, so p = 0 is
        mask = torch.rand(base.shape, generator=ctx.generator) < keep
        edited[name] = (base + mask * (tuned.double() - base) / keep).to(ctx.base[name].dtype)
    return edited
