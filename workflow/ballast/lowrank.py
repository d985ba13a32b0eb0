"""Attaching and starting adapters of the low-rank family: what LoRA's relatives share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ballast.adapters import LowRank
from ballast.context import Context
from ballast.errors import SuiteError


def attach_low_rank(
    ctx: Context,
    scale: float,
    dropout: float = 0.0,
    layer: Callable[[nn.Module, int, float, float], nn.Module] = LowRank,
    names: Sequence[str] | None = None,
) -> None:
    """Replace targets (those of `names`, or all) by `layer(target, rank, scale, dropout)`.

    Raises SuiteError if the rank exceeds a target's smaller side: such an update is not low-rank
    and its nominal rank would be a wrong label.
    """
    if ctx.rank is None:
        raise SuiteError("rank: this method needs one")
    if not ctx.targets:
        raise SuiteError("modules: nothing to adapt")
    for name in ctx.targets if names is None else names:
        base = ctx.model.get_submodule(name)
        limit = min(base.weight.shape)
        if ctx.rank > limit:
            raise SuiteError(
                f"rank {ctx.rank} is larger than {name} [{base.weight.shape[0]}, "
                f"{base.weight.shape[1]}] allows: at most {limit}"
            )
        ctx.replace(name, layer(base, ctx.rank, scale, dropout))


def target_shapes(ctx: Context) -> list[tuple[int, int]]:
    """Shapes [m, n] = [out, in] of the targets, before or after they are adapted."""
    shapes = []
    for name in ctx.targets:
        module = ctx.model.get_submodule(name)
        module = getattr(module, "base", module)
        m, n = module.weight.shape
        shapes.append((n, m) if isinstance(module, nn.Embedding) else (m, n))
    return shapes


@torch.no_grad()
def start_kaiming(ctx: Context) -> None:
    """A uniform in +-1/sqrt(n), B = 0 (loralib: kaiming_uniform(a=sqrt 5)).

    For embeddings, as in loralib, A = 0 and B normal.
    """
    for _, layer in ctx.adapters():
        if not isinstance(layer, LowRank):
            continue
        if layer.is_embedding:
            layer.A.zero_()
            layer.B.copy_(_normal(layer.B, ctx.generator))
        else:
            start = torch.empty(layer.A.shape, dtype=layer.A.dtype)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=ctx.generator)
            layer.A.copy_(start)
            layer.B.zero_()


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


@torch.no_grad()
def start_from_weight(
    ctx: Context, factors: Callable[[Tensor, int, float], tuple[Tensor, Tensor]]
) -> None:
    """Start every adapter at factors of its own base weight, which are subtracted from the base.

    factors(W0 [m, n], r, s) -> (A [r, n], B [m, r]) with s B A the part of W0 that trains.
    """
    for name, layer in ctx.adapters():
        if layer.is_embedding:
            raise SuiteError(
                f"modules: {name} is an embedding; this initialisation is for linear modules only"
            )
        a, b = factors(layer.base.weight.detach(), layer.rank, layer.scale)
        kind = {"dtype": layer.A.dtype, "device": layer.A.device}
        layer.set_offset(a.to(**kind), b.to(**kind))
