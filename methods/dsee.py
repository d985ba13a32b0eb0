"""DSEE: LoRA plus a few sparse entries, at places read off a decomposition of the weight itself.

    W0 ~ U V + S   (GreBsmo: greedy bilateral low-rank plus sparse)
    y = W0 x + s (B A + S2) x,   supp S2 = the `entries` largest |S|,   S2 = 0 at the start

GreBsmo as released: from one random row V, `rounds` times: twice U = orth((W0 - S) V^T),
V = U^T (W0 - S), S = W0 - U V with entries below `threshold` set to 0; then `grow` rows are added
to V, the leading ones of R in the QR of what is left, W0 - U V - S. The released 100 rounds of 5
rows end at rank 496, of a matrix of side 768; here the rank stops at `most` of the smaller side,
since at full rank nothing is left to be sparse. Places are ranked by |W0 - U V| of the last round:
the same as |S| wherever `entries` of it pass the threshold, and defined where fewer do.
A normal (0, 0.02), B = 0; S2 has the low-rank part's scale s = alpha / r (code). The paper adapts
the queries and values. Its second sparsity, pruning W0 for inference, is another question than
tuning and is not done. Trainable per matrix: r (m + n) + entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.lowrank import attach_low_rank, target_shapes
from ballast.sparse import place_largest, refuse_embeddings

from .rosa import Robust
from .spa import report  # noqa: F401

declaration = Declaration(
    title="DSEE",
    citation="Chen et al., DSEE: Dually Sparsity-Embedded Efficient Tuning of Pre-trained Language "
    "Models, ACL 2023, arXiv:2111.00160",
    family="reparameterization",
    rank="inner dimension r of B A; the sparse part has `entries` per matrix",
    merges=True,
    random_start=True,
    learning_rate=2e-4,
    learning_rate_source="the released scripts, SST-2",
)


@dataclass(frozen=True)
class Hyper:
    alpha_over_r: float = hyper(2.0, "r 16, alpha 32 (released scripts)", low=0.0)
    dropout: float = hyper(0.0, "chosen here, as for LoRA", low=0.0, high=0.99)
    entries: int = hyper(16, "num_sparse of the scripts; 128 in the code", low=1)
    rounds: int = hyper(100, "released code", low=1)
    grow: int = hyper(5, "rows added in a round (released code)", low=1)
    threshold: float = hyper(0.01, "q of the released code", low=0.0)
    most: float = hyper(
        0.65, "of the smaller side: 496 of 768 in the released code", low=0.01, high=0.99
    )
    kernel: str = hyper("sampled", "of the values' gradients", choices=("sampled", "dense"))


def attach(ctx: Context) -> None:
    refuse_embeddings(ctx)
    for name, (m, n) in zip(ctx.targets, target_shapes(ctx), strict=True):
        if ctx.hyper.entries > m * n:
            raise SuiteError(f"entries: {ctx.hyper.entries}; {name} [{m}, {n}] has {m * n}")
        scale = ctx.hyper.alpha_over_r
        layer = partial(
            Robust, count=ctx.hyper.entries, sparse_scale=scale, kernel=ctx.hyper.kernel
        )
        attach_low_rank(ctx, scale, ctx.hyper.dropout, layer, names=(name,))


@torch.no_grad()
def initialise(ctx: Context) -> None:
    left = {}
    for name, layer in ctx.adapters():
        layer.A.copy_(0.02 * torch.randn(layer.A.shape, generator=ctx.generator))
        layer.B.zero_()
        weight = layer.base.weight.detach().to(layer.A.dtype)
        first = torch.randn(1, weight.shape[1], generator=ctx.generator).to(weight)
        hyper = ctx.hyper
        u, v = low_rank_part(weight, first, hyper.rounds, hyper.grow, hyper.threshold, hyper.most)
        left[name] = (weight - u @ v).abs()
    place_largest(ctx, left)


def low_rank_part(
    weight: Tensor, first: Tensor, rounds: int, grow: int, threshold: float, most: float
) -> tuple[Tensor, Tensor]:
    """U [m, k] and V [k, n] of GreBsmo on `weight` [m, n], starting from V = `first` [1, n]."""
    limit = max(1, int(most * min(weight.shape)))
    v = first
    for count in range(rounds):
        sparse = torch.zeros_like(weight)
        for _ in range(2):
            u = torch.linalg.qr((weight - sparse) @ v.T).Q
            v = u.T @ (weight - sparse)
            rest = weight - u @ v
            sparse = torch.where(rest.abs() < threshold, 0, rest)
        room = limit - len(v)
        if room <= 0 or count == rounds - 1:
            break
        added = torch.linalg.qr(rest - sparse).R[: min(grow, room)]
        v = torch.cat([v, added])
    return u, v


def total_parameters(ctx: Context, rank: int) -> int:
    return sum(rank * (m + n) + ctx.hyper.entries for m, n in target_shapes(ctx))
