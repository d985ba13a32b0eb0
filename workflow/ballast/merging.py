"""Merging finished models: what the post-hoc methods on several parents share.

A parent is the weights in which a tuned model differs from the base; a weight that it did not
change is the base's. Differences are taken in float64, where that of two stored numbers is exact,
so that a method's end points are exact too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ballast.context import PostHoc


def changed_names(ctx: PostHoc) -> list[str]:
    """Names of the weights that any parent changed, sorted."""
    return sorted({name for tuned in ctx.tuned for name in tuned})


def parents_of(ctx: PostHoc, name: str) -> Tensor:
    """One weight of every parent, float64 [parents, *shape]."""
    base = ctx.base[name]
    return torch.stack([tuned.get(name, base).double() for tuned in ctx.tuned])


def deltas_of(ctx: PostHoc, name: str) -> Tensor:
    """theta_t - theta0 of one weight for every parent t, float64 [parents, *shape]."""
    return parents_of(ctx, name) - ctx.base[name].double()


def with_delta(ctx: PostHoc, name: str, delta: Tensor) -> Tensor:
    """theta0 + delta at the base's precision."""
    base = ctx.base[name]
    return (base.double() + delta).to(base.dtype)
