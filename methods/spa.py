"""SpA (sparse adaptation): a sparse update of each matrix at places chosen by the task's gradients.

    y = (W0 + S) x,   supp S = the int(d m n) entries with the largest score,   S = 0 at the start
    score = mean over `gradients` batches of (dL/dW)^2, or |mean of dL/dW|

RoSA without its low-rank part (schedule "spa_only" of the released code): the mask is made once at
the base, per matrix. The values are the only parameters; W0 + S is formed in the forward and again
in the backward pass and kept in neither. Values train by `kernel: sampled` (dY^T X at the places
alone) or `dense` (from the whole dY^T X). Gradients of whole batches are squared, as released: a
Fisher diagonal of batches, not of examples as in FISH. Trainable per matrix: int(d m n).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ballast.adapters import Adapter
from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.lowrank import target_shapes
from ballast.sparse import (
    SparseUpdate,
    base_weights,
    gradient_scores,
    grouped,
    place_largest,
    refuse_embeddings,
    sparse_parts,
)

declaration = Declaration(
    title="SpA",
    citation="Nikdan et al., RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation, "
    "ICML 2024, arXiv:2401.04679",
    family="reparameterization",
    merges=True,
    learning_rate=2e-4,
    learning_rate_source="the released scripts, for the sparse part",
)


@dataclass(frozen=True)
class Hyper:
    density: float = hyper(0.006, "d 0.6 % (paper, beside LoRA of rank 16)", low=1e-6, high=1.0)
    score: str = hyper("mean_squared", "grad_acc_mode", choices=("mean_squared", "mean"))
    gradients: int = hyper(1, "spa_num_grads", low=1)
    batch: int = hyper(32, "examples per gradient (scripts)", low=1)
    kernel: str = hyper("sampled", "of the values' gradients", choices=("sampled", "dense"))


class SparselyAdapted(Adapter):
    """y = (W0 + S) x on a Linear."""

    def __init__(self, base: nn.Module, count: int, kernel: str) -> None:
        super().__init__(base)
        self.sparse = SparseUpdate(base.weight, count, kernel=kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        y = self.sparse.linear(x.flatten(0, -2), self.base)
        return y.view(*x.shape[:-1], y.shape[-1])

    def restored(self) -> None:
        self.sparse.refresh()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return self.sparse.added_to(self.base.weight.to(self.sparse.values.dtype))


def attach(ctx: Context) -> None:
    refuse_embeddings(ctx)
    for name, count in zip(ctx.targets, nonzeros(ctx), strict=True):
        base = ctx.model.get_submodule(name)
        ctx.replace(name, SparselyAdapted(base, count, ctx.hyper.kernel))


def calibrate(ctx: Context) -> None:
    count = ctx.hyper.gradients * ctx.hyper.batch
    place_largest(ctx, scores(ctx, grouped(ctx.batches(count), ctx.hyper.batch)))


def scores(ctx: Context, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What the places are chosen by, for every adapted matrix [m, n]."""
    if ctx.hyper.score == "mean_squared":
        return gradient_scores(ctx, base_weights(ctx), batches)
    means = gradient_scores(ctx, base_weights(ctx), batches, of=torch.clone)
    return {name: mean.abs() for name, mean in means.items()}


def nonzeros(ctx: Context) -> list[int]:
    """nnz of every target's S: int(d m n). Raises SuiteError where the density leaves none."""
    counts = []
    for name, (m, n) in zip(ctx.targets, target_shapes(ctx), strict=True):
        counts.append(int(ctx.hyper.density * m * n))
        if counts[-1] < 1:
            raise SuiteError(
                f"density: {ctx.hyper.density} leaves no entry of {name} [{m}, {n}]; "
                f"at least {1 / (m * n):.2g} is needed"
            )
    return counts


def total_parameters(ctx: Context, size: int | None = None) -> int:
    return sum(nonzeros(ctx))


def report(ctx: Context) -> dict[str, float]:
    return {"nnz": sum(len(sparse.values) for sparse in sparse_parts(ctx).values())}
