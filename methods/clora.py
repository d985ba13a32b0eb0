"""CLoRA: LoRA whose update is kept out of subspaces that are drawn in advance.

    L = L_task + lambda sum_matrices 1/2 (||A V||_F^2 + ||B^T U||_F^2)
    V [n, k] and U [m, k]: random with orthonormal columns, fixed for the run

A V = 0 puts the k directions of V into the null space of the update: inputs along them are answered
as the base answers them. B^T U = 0 does the same for k directions of the output. The rank and the
norm of the update are free outside. The factor 1/2 and the sum (not mean) over matrices are the
released code's.

k = min(`k`, `share` x the side): the released example's 512 are an eighth of the 4,096 of 7B
models, and on a narrow matrix 512 directions would be all of them, which is plain L2 decay. U and V
are not stored: a cell keeps the seed that they were drawn from and draws them again when it is
continued. They hold k (m + n) numbers per matrix in memory, and the penalty costs r k (m + n) per
matrix and step, whatever the number of tokens. Trainable per matrix: r (m + n).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.lowrank import start_kaiming

from .lora import attach, parameter_count  # noqa: F401

declaration = Declaration(
    title="CLoRA",
    citation="Lu et al., Controlled Low-Rank Adaptation with Subspace Regularization for "
    "Continued Training on Large Language Models, ACL 2025, arXiv:2410.16801",
    family="reparameterization",
    rank="inner dimension r of B A",
    merges=True,
    random_start=True,
    learning_rate=2e-4,
    learning_rate_source="that of LoRA: the released code, a wrapper of PEFT's LoRA, names none",
)


@dataclass(frozen=True)
class Hyper:
    alpha_over_r: float = hyper(2.0, "alpha = 2r, as for LoRA", low=0.0)
    dropout: float = hyper(0.0, "that of LoRA here", low=0.0, high=0.99)
    strength: float = hyper(1.0, "lambda of the released code", low=0.0)
    k: int = hyper(512, "the released code's example", low=1)
    share: float = hyper(0.125, "512 of 4,096; chosen here for narrow matrices", low=1e-6, high=1.0)


def initialise(ctx: Context) -> None:
    start_kaiming(ctx)
    ctx.state["seed"] = int(torch.randint(2**62, (1,), generator=ctx.generator))


def penalty(ctx: Context) -> Tensor | None:
    if not ctx.hyper.strength:
        return None
    terms = []
    for (_, layer), (u, v) in zip(ctx.adapters(), subspaces(ctx), strict=True):
        terms += [(layer.A @ v).square().sum(), (layer.B.T @ u).square().sum()]
    return 0.5 * ctx.hyper.strength * torch.stack(terms).sum()


def subspaces(ctx: Context) -> list[tuple[Tensor, Tensor]]:
    """(U [m, k], V [n, k]) of every adapter, in the model's order; drawn once per process."""
    if "subspaces" not in ctx.scratch:
        generator = torch.Generator().manual_seed(int(ctx.state["seed"]))
        ctx.scratch["subspaces"] = [
            (
                _orthonormal(ctx, layer.B.shape[0], layer.B, generator),
                _orthonormal(ctx, layer.A.shape[1], layer.A, generator),
            )
            for _, layer in ctx.adapters()
        ]
    return ctx.scratch["subspaces"]


def _orthonormal(ctx: Context, side: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns [side, k], uniform over subspaces."""
    k = max(1, min(ctx.hyper.k, round(ctx.hyper.share * side)))
    columns = torch.empty(side, k, dtype=like.dtype)
    nn.init.orthogonal_(columns, generator=generator)
    return columns.to(like.device)


@torch.no_grad()
def report(ctx: Context) -> dict[str, float]:
    """Shares of ||A||^2 and ||B||^2 in the forbidden subspaces; about k / n without the penalty."""
    inside, whole = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for (_, layer), (u, v) in zip(ctx.adapters(), subspaces(ctx), strict=True):
        for i, (factor, basis) in enumerate(((layer.A, v), (layer.B.T, u))):
            inside[i] += (factor @ basis).square().sum().item()
            whole[i] += factor.square().sum().item()
    a, b = (inside / whole.clamp_min(1e-30)).tolist()
    return {"forbidden_share_a": a, "forbidden_share_b": b}
