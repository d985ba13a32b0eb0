"""CorDA: LoRA that starts from components of the weight as sampled inputs see them.

    C = mean over examples of X^T X,   X [tokens, n] the layer's inputs / |their largest entry|
    W0 C = U S V^T,   so that W0 = U S (V^T C^-1)
    B_0 = U_r sqrt(S_r / s),   A_0 = sqrt(S_r / s) V_r^T C^-1
    y = (W0 - s B_0 A_0) x + s B A x,   s = alpha / r = 1

`mode` kpm (knowledge-preserved) trains the r *smallest* components and freezes those that the
sampled inputs rely on; ipm (instruction-previewed) trains the r largest. PEFT's default is ipm; kpm
is the one for stability and the default here. C is damped with 0.01 of its mean diagonal, doubled
until the inverse's error ||C C^-1 - I||_F is below 0.05 (paper and code).

What is sampled: in the paper kpm samples questions about the knowledge to keep (NQ open, TriviaQA)
and ipm the training set. A cell sees its own training data and nothing else, so both modes sample
that: kpm here starts at what the *target's* inputs hardly excite, which is not the paper's choice
of what to keep, and can learn more slowly. Scaling each example by its largest (signed) entry is
the code's and PEFT's. Padding is left out of C where rows are tokens of the batch; all rows of a
connector count. The decomposition is made in fp32 (float64 for a float64 base) and needs one [n, n]
matrix per target while the examples are read. A_0 and B_0 are stored with the adapter, so that a
stored cell needs neither samples nor decomposition. Trainable per matrix: r (m + n).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ballast.adapters import LowRank
from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.lowrank import attach_low_rank

from .lora import parameter_count  # noqa: F401

declaration = Declaration(
    title="CorDA",
    citation="Yang et al., CorDA: Context-Oriented Decomposition Adaptation of Large Language "
    "Models for Task-Aware Parameter-Efficient Fine-tuning, NeurIPS 2024, arXiv:2406.05223",
    family="reparameterization",
    rank="number of context-oriented components that train",
    merges=True,
    learning_rate=2e-5,
    learning_rate_source="the released script (batch 128, MetaMathQA)",
)


@dataclass(frozen=True)
class Hyper:
    mode: str = hyper(
        "kpm", "the paper's for keeping knowledge; ipm for the target", choices=("kpm", "ipm")
    )
    alpha_over_r: float = hyper(1.0, "alpha = r (paper)", low=1e-6)
    dropout: float = hyper(
        0.0, "0 (paper): dropout would drop a part of the weight itself", low=0.0, high=0.0
    )
    examples: int = hyper(256, "samples for C (paper)", low=1)
    damping: float = hyper(0.01, "of C's mean diagonal (released code)", low=1e-6)
    error: float = hyper(0.05, "largest error of the inverse (released code)", low=1e-12)


def attach(ctx: Context) -> None:
    for name in ctx.targets:
        if isinstance(ctx.model.get_submodule(name), nn.Embedding):
            raise SuiteError(
                f"modules: {name} is an embedding; CorDA needs the inputs of linear modules"
            )
    attach_low_rank(ctx, scale=ctx.hyper.alpha_over_r)


@torch.no_grad()
def calibrate(ctx: Context) -> None:
    covariances, count = _covariances(ctx)
    for name, layer in ctx.adapters():
        total = covariances.pop(name, None)
        if total is None:
            raise SuiteError(f"{name}: no input in {count} examples, so CorDA cannot start there")
        weight = layer.base.weight.detach().to(layer.A.dtype)
        parts = decompose(name, weight, total / count, ctx.hyper.damping, ctx.hyper.error)
        u, s, vh = (_chosen(part, ctx.hyper.mode, layer.rank) for part in parts)
        root = (s / layer.scale).sqrt()
        layer.set_offset(root[:, None] * vh.T, u * root)


def decompose(
    name: str, weight: Tensor, covariance: Tensor, damping: float, error: float
) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, k], S [k] and C^-1 V [n, k] of W C, the components along the last dimension.

    Raises SuiteError if C has no inverse within `error`, which only values that are not finite and
    inputs that are zero can bring about: damping makes any other C well-conditioned.
    """
    identity = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    level = covariance.diagonal().mean()
    while torch.isfinite(level) and level > 0 and damping < 1e6:
        damped = covariance + damping * level * identity
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < error:
            u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
            return u, s, (vh @ inverse).T
        damping *= 2
    raise SuiteError(f"{name}: the covariance of its inputs has no inverse; are they all zero?")


def _chosen(part: Tensor, mode: str, rank: int) -> Tensor:
    """The r smallest components (kpm), or the r largest (ipm)."""
    return part[..., -rank:] if mode == "kpm" else part[..., :rank]


def _covariances(ctx: Context) -> tuple[dict[str, Tensor], int]:
    """Sum over examples of X^T X [n, n] for every target, and the number of examples."""
    sums: dict[str, Tensor] = {}
    kept: Tensor | None = None

    def collect(name: str, layer: LowRank, rows: Tensor) -> None:
        if kept is not None and len(rows) == len(kept):
            rows = rows[kept]
        rows = rows.to(layer.A.dtype)
        rows = rows / rows.max().abs()
        sums[name] = sums.get(name, 0) + rows.T @ rows

    def hook(name: str, layer: LowRank) -> torch.utils.hooks.RemovableHandle:
        return layer.base.register_forward_pre_hook(
            lambda _, inputs: collect(name, layer, inputs[0].flatten(0, -2))
        )

    handles = [hook(name, layer) for name, layer in ctx.adapters()]
    was_training, count = ctx.model.training, 0
    ctx.model.eval()
    try:
        for example in _examples(ctx):
            mask = example.get("attention_mask")
            kept = None if mask is None else mask.flatten().bool()
            ctx.model(**{key: value for key, value in example.items() if key != "labels"})
            count += 1
    finally:
        for handle in handles:
            handle.remove()
        ctx.model.train(was_training)
    return sums, count


def _examples(ctx: Context) -> Iterator[dict[str, Tensor]]:
    assert ctx.batches is not None
    for batch in ctx.batches(ctx.hyper.examples):
        for i in range(len(batch["labels"])):
            yield {key: value[i : i + 1] for key, value in batch.items()}
