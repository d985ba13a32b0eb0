"""LoRASculpt: LoRA whose factors are pruned early in training, under a conflict penalty.

    after `threshold` optimiser steps, for each A and each B by itself: keep the `density` share of
    entries that are largest in size, set the rest to zero, and again after every later step

    L = L_task + alpha mean_LM ||M o (B A)||_F + beta mean_connector ||M o (B A)||_F
    M = tanh(omega |1 / log(|W0| / ||W0||_F)|)   in [0, 1], larger where |W0| is

Independent masks of densities s_A and s_B give the product a density of 1 - (1 - s_A s_B)^r; both
it and the measured one go into the record. The connector, where it is adapted, is penalised by a
weight of its own and never pruned (the paper; the released code leaves its projector out of LoRA,
so that its clause for it matches nothing).

threshold = min(100, fraction x steps): the code's 100 are 2.7 % of its 3,750 steps, and a run of
fewer than 100 would never be pruned. Further differences from the code: entries are zeroed after
the optimiser's step, the last one included (the code zeroes before each step, so that its final
checkpoint is denser than it says); the code's dropout 0.05 is 0 here as in LoRA. As there, the
penalty is on q, k and v only and has no scale s; Adam's moments are not masked.

The penalty's value and its exact gradient, with C = M o M o (B A) and f = ||M o (B A)||_F,

    df/dB = C A^T / f,   df/dA = B^T C / f   (0 at B A = 0, as torch.norm has it)

come in one pass over chunks of rows, so that no [m, n] of B A is ever held. M o M is kept for each
penalised matrix, in fp32, or made again chunk by chunk in every step (`keep_importance: false`:
a log and a tanh for each entry, and no memory; the released code recomputes it).

Ablations of the paper, as variants: the mask alone is `alpha: 0, beta: 0`; the conflict term alone
is `density: 1`, which prunes nothing; the connector's term alone is `alpha: 0, density: 1` with the
connector adapted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ballast.adapters import LowRank
from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.lowrank import attach_low_rank
from ballast.sparse import largest

from .lora import initialise, parameter_count  # noqa: F401

PENALISED = ("q", "k", "v")
CHUNK = 2**18  # entries of B A held at once: about what stays in a core's cache

declaration = Declaration(
    title="LoRASculpt",
    citation="Liang et al., LoRASculpt: Sculpting LoRA for Harmonizing General and Specialized "
    "Knowledge in Multimodal Large Language Models, CVPR 2025, arXiv:2503.16843",
    family="reparameterization",
    rank="inner dimension r of B A",
    merges=True,
    random_start=True,
    learning_rate=2e-4,
    learning_rate_source="the released script for LLaVA-1.5-7B",
)


@dataclass(frozen=True)
class Hyper:
    alpha_over_r: float = hyper(2.0, "r 32, alpha 64 (released script)", low=0.0)
    dropout: float = hyper(
        0.0, "that of LoRA here; the released script has 0.05", low=0.0, high=0.99
    )
    density: float = hyper(
        0.1, "AB_PRESERVE_RATIO of the released code; 1: no pruning", low=0.0, high=1.0
    )
    fraction: float = hyper(0.1, "of the run, chosen here for short runs", low=0.0, high=1.0)
    alpha: float = hyper(1e-3, "CMR_LAMBDA of the released code", low=0.0)
    beta: float = hyper(1e-3, "alpha's; the released code has none for the connector", low=0.0)
    omega: float = hyper(1.0, "OMEGA of the released code", low=0.0)
    keep_importance: bool = hyper(True, "the faster way; false: the leaner, as in the code")

    def __post_init__(self) -> None:
        if self.density == 0:
            raise ValueError(
                "density: 0; nothing would be left to train; allowed: above 0, up to 1 (no pruning)"
            )


class Sculpted(LowRank):
    """LowRank with masks that do not exist before pruning."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank, scale, dropout)
        self.register_buffer("mask_A", None)
        self.register_buffer("mask_B", None)


def attach(ctx: Context) -> None:
    attach_low_rank(ctx, scale=ctx.hyper.alpha_over_r, dropout=ctx.hyper.dropout, layer=Sculpted)


def penalty(ctx: Context) -> Tensor | None:
    language, connector = [], []
    for name, layer in ctx.adapters():
        if ctx.in_connector(name):
            if ctx.hyper.beta:
                connector.append(_conflict(ctx, name, layer))
        elif ctx.hyper.alpha and ctx.anatomy.role(name) in PENALISED:
            language.append(_conflict(ctx, name, layer))
    weighted = ((ctx.hyper.alpha, language), (ctx.hyper.beta, connector))
    terms = [weight * torch.stack(parts).mean() for weight, parts in weighted if parts]
    return torch.stack(terms).sum() if terms else None


@torch.no_grad()
def after_step(ctx: Context) -> None:
    if ctx.hyper.density == 1:
        return
    for _, layer in _prunable(ctx):
        if ctx.step == threshold(ctx):
            layer.mask_A = sculpted(layer.A, ctx.hyper.density)
            layer.mask_B = sculpted(layer.B, ctx.hyper.density)
        if layer.mask_A is not None:
            layer.A.mul_(layer.mask_A)
            layer.B.mul_(layer.mask_B)


def threshold(ctx: Context) -> int:
    """The optimiser step after which the masks are made, from 1 on."""
    return max(1, min(100, round(ctx.hyper.fraction * ctx.total_steps)))


def sculpted(tensor: Tensor, density: float) -> Tensor:
    """Mask of the `density` share of entries that are largest in size, at least one."""
    return largest(tensor.abs(), max(1, int(tensor.numel() * density)))


def importance(weight: Tensor, omega: float, norm: Tensor | None = None) -> Tensor:
    """M of a base weight [m, n], or of some of its rows where `norm` is the whole's."""
    norm = torch.linalg.vector_norm(weight) if norm is None else norm
    share = (weight.abs() / norm).add_(1e-15)
    return share.log_().reciprocal_().abs_().mul_(omega).tanh_()


def product_density(density_a: float, density_b: float, rank: int) -> float:
    """Expected share of non-zero entries of B A under independent masks."""
    return 1 - (1 - density_a * density_b) ** rank


@torch.no_grad()
def report(ctx: Context) -> dict[str, float]:
    counts = torch.zeros(6, dtype=torch.float64)
    for _, layer in _prunable(ctx):
        for i, tensor in enumerate((layer.A, layer.B, layer.B @ layer.A)):
            counts[2 * i] += torch.count_nonzero(tensor).item()
            counts[2 * i + 1] += tensor.numel()
    a, b, product = (counts[0::2] / counts[1::2]).tolist()
    return {
        "threshold_step": threshold(ctx),
        "density_a": a,
        "density_b": b,
        "density_ba": product,
        "density_ba_theory": product_density(a, b, ctx.rank or 0),
    }


def _prunable(ctx: Context) -> list[tuple[str, Sculpted]]:
    return [(name, layer) for name, layer in ctx.adapters() if not ctx.in_connector(name)]


def _conflict(ctx: Context, name: str, layer: Sculpted) -> Tensor:
    """||M o (B A)||_F of one matrix."""
    weight, dtype = layer.base.weight.detach(), layer.A.dtype
    known = ctx.scratch.setdefault("importance", {})
    if name not in known:
        known[name] = torch.linalg.vector_norm(weight, dtype=dtype)
        if ctx.hyper.keep_importance:
            known[name] = importance(weight.to(dtype), ctx.hyper.omega, known[name]).square_()

    def squares(rows: slice) -> Tensor:
        if ctx.hyper.keep_importance:
            return known[name][rows]
        return importance(weight[rows].to(dtype), ctx.hyper.omega, known[name]).square_()

    return WeightedNorm.apply(layer.A, layer.B, squares)


class WeightedNorm(torch.autograd.Function):
    """||M o (B A)||_F for A [r, n] and B [m, r], of which `squares` gives rows of M o M."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, squares: Callable[[slice], Tensor]) -> Tensor:
        total, grad_a, grad_b = a.new_zeros(()), torch.zeros_like(a), torch.empty_like(b)
        step = max(1, CHUNK // a.shape[1])
        for start in range(0, len(b), step):
            rows = slice(start, start + step)
            product = b[rows] @ a
            weighted = squares(rows) * product
            total += torch.dot(weighted.flatten(), product.flatten())
            grad_b[rows] = weighted @ a.T
            grad_a.addmm_(b[rows].T, weighted)
        norm = total.sqrt_()
        inverse = torch.where(norm > 0, 1 / norm, 0)
        ctx.save_for_backward(grad_a.mul_(inverse), grad_b.mul_(inverse))
        return norm

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_a, grad_b = ctx.saved_tensors
        return grad * grad_a, grad * grad_b, None
