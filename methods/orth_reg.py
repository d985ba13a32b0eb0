"""PEGO ("Orth-Reg"): a group of LoRAs kept orthogonal to the weight and to each other.

    y = W0 x + sum_i B_i A_i x,   A_i [r, n], B_i [m, r],   i = 1..N
    L = L_task + lambda sum_matrices (sum_i |W0 (B_i A_i)^T|_1 + sum_{i<j} |B_i A_i (B_j A_j)^T|_1)

|.|_1 sums absolute values over all entries. The first term (preserve) keeps every row of an update
orthogonal to every row of W0, the second (diversify) the updates to each other. There is no scale
s. The released code adapts and penalises the query and value projections of a vision tower; here it
is every adapted matrix. lambda multiplies sums over m^2 entries, so its pull grows with the width
of a model: it was chosen at m = 768.

The N LoRAs are one of rank N r, whose forward costs as much; N r rows cannot be orthogonal in fewer
than N r dimensions, so N r is what min(m, n) bounds. The penalty and its gradient are made together
in row chunks: no [m, m] matrix stays, and a bf16 weight is raised to fp32 one matrix at a time. It
costs about N r (2 m n + 3 m^2 + 3 m^2 (N - 1) / 2) multiplications per matrix and step, however
many tokens there are. At B = 0 its subgradient is 0. Trainable per matrix: N r (m + n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ballast.adapters import LowRank
from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.lowrank import target_shapes

from .lora import initialise  # noqa: F401

CHUNK = 2**22  # entries of an [m, m] product that are held at once

declaration = Declaration(
    title="PEGO (orthogonal regularisation)",
    citation="Hu et al., Learn to Preserve and Diversify: Parameter-Efficient Group with "
    "Orthogonal Regularization for Domain Generalization, ECCV 2024, arXiv:2407.15085",
    family="reparameterization",
    rank="inner dimension r of each of the N updates of the group",
    merges=True,
    random_start=True,
    learning_rate=5e-4,
    learning_rate_source="the released scripts, for CLIP ViT-B/16",
)


@dataclass(frozen=True)
class Hyper:
    groups: int = hyper(4, "N; 4 in four of the five released scripts, 2 for PACS", low=1)
    strength: float = hyper(1e-3, "lambda of the released scripts", low=0.0)
    dropout: float = hyper(0.0, "none (released code)", low=0.0, high=0.99)


def attach(ctx: Context) -> None:
    if ctx.rank is None or not ctx.targets:
        raise SuiteError("rank, modules: this method needs a rank and modules to adapt")
    groups = ctx.hyper.groups
    narrowest = min(ctx.targets, key=lambda name: min(_shape(ctx, name)))
    limit = min(_shape(ctx, narrowest))
    if ctx.rank * groups > limit:
        raise SuiteError(
            f"rank {ctx.rank} is larger than {narrowest} {list(_shape(ctx, narrowest))} allows: "
            f"{groups} orthogonal updates share at most {limit}, so each has at most "
            f"{limit // groups}; fewer groups or a smaller rank is needed"
        )
    for name in ctx.targets:
        base = ctx.model.get_submodule(name)
        ctx.replace(name, LowRank(base, ctx.rank * groups, 1.0, ctx.hyper.dropout))


def penalty(ctx: Context) -> Tensor | None:
    if not ctx.hyper.strength:
        return None
    terms = []
    for _, layer in ctx.adapters():
        terms.append(_Orthogonality.apply(layer.A, layer.B, _weight(layer), ctx.hyper.groups))
    return ctx.hyper.strength * torch.stack(terms).sum()


def allowed_sizes(ctx: Context) -> range:
    """Ranks that every target has room for."""
    limit = min(min(_shape(ctx, name)) for name in ctx.targets)
    return range(1, max(1, limit // ctx.hyper.groups) + 1)


def total_parameters(ctx: Context, rank: int) -> int:
    return sum(ctx.hyper.groups * rank * sum(shape) for shape in target_shapes(ctx))


def _shape(ctx: Context, name: str) -> torch.Size:
    return ctx.model.get_submodule(name).weight.shape


@torch.no_grad()
def report(ctx: Context) -> dict[str, float]:
    """The two sums of the penalty without lambda, over all matrices."""
    preserve = diversify = 0.0
    for _, layer in ctx.adapters():
        parts = _regulariser(layer.A, layer.B, _weight(layer), ctx.hyper.groups)
        preserve, diversify = preserve + parts[0].item(), diversify + parts[1].item()
    return {"preserve": preserve, "diversify": diversify}


def _weight(layer: LowRank) -> Tensor:
    """W0 [m, n], or an embedding's [d, V]."""
    weight = layer.base.weight.detach()
    return weight.T if layer.is_embedding else weight


class _Orthogonality(torch.autograd.Function):
    """Both sums of one matrix; the gradient is made with the value, so nothing large is kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, weight: Tensor, groups: int) -> Tensor:
        preserve, diversify, grad_a, grad_b = _regulariser(a, b, weight, groups)
        ctx.save_for_backward(grad_a, grad_b)
        return preserve + diversify

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_a, grad_b = ctx.saved_tensors
        return grad * grad_a, grad * grad_b, None, None


def _regulariser(
    a: Tensor, b: Tensor, weight: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(preserve, diversify, gradient to A [N r, n], gradient to B [m, N r]) of one matrix."""
    weight = weight.to(a.dtype)
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    each_a, each_b = a.chunk(groups), b.chunk(groups, dim=1)
    to_a, to_b = grad_a.chunk(groups), grad_b.chunk(groups, dim=1)
    preserve, diversify = a.new_zeros(()), a.new_zeros(())
    for i in range(groups):
        value, left, right = _l1_of_product(weight @ each_a[i].T, each_b[i])
        preserve += value
        to_a[i].add_(left.T @ weight)
        to_b[i].add_(right)
        for j in range(i + 1, groups):
            core = each_a[i] @ each_a[j].T
            value, left, right = _l1_of_product(each_b[i] @ core, each_b[j])
            diversify += value
            to_core = each_b[i].T @ left
            to_a[i].add_(to_core @ each_a[j])
            to_a[j].add_(to_core.T @ each_a[i])
            to_b[i].add_(left @ core.T)
            to_b[j].add_(right)
    return preserve, diversify, grad_a, grad_b


def _l1_of_product(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|left right^T|_1 of [p, r] and [q, r], and its gradients to both, in chunks of rows."""
    value, to_right, to_left = left.new_zeros(()), torch.zeros_like(right), []
    for rows in left.split(max(1, CHUNK // len(right))):
        product = rows @ right.T
        value += product.abs().sum()
        signs = product.sign_()
        to_left.append(signs @ right)
        to_right += signs.T @ rows
    return value, torch.cat(to_left), to_right
