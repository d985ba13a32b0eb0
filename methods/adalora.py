"""AdaLoRA: singular triplets instead of ranks, pruned during training where they matter least.

    W = W0 + s P diag(lambda) Q,   P [m, r0], lambda [r0], Q [r0, n],   s = alpha / (r0 + 1e-5)

(`B`, `E` and `A` below.) lambda starts at zero, P and Q normal with standard deviation 0.02. A
penalty keeps P and Q near orthogonal, in training only: it is no part of an evaluated loss.

Importance of every entry w after every optimiser step, from its gradient g in that step:

    I = |w g|;   Ibar = b1 Ibar + (1 - b1) I;   Ubar = b2 Ubar + (1 - b2) |I - Ibar|
    s(w) = Ibar Ubar;   S_i = s(lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij)   of triplet i

Every `delta_t` steps only the b(t) triplets of largest S among those of all matrices keep their
lambda, the others' are set to zero (and may come back at the next allocation, since Adam moves them
in between). With T steps, t_i = tinit T and t_f = tfinal T, the budget is b0 = all triplets up to
t_i, then falls as b_T + (b0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3 and reaches
b_T = rank x matrices at step T - t_f, where an allocation always takes place (the authors' code
misses it where delta_t does not divide that step and t_f is 0). From there on the mask is fixed and
applied after every step, and the averages are forgotten.

Choices where sources differ:
  * w after the step, g clipped and from before it: the authors' trainer and PEFT's
    `update_and_allocate`; the paper's algorithm takes both from before. Averages are updated up to
    the step before the last allocation, as in the code (at step 1, where that is the last).
  * `orthogonality: norm` is gamma x the mean over all factors of ||P^T P - I||_F, ||Q Q^T - I||_F
    (code, PEFT); `squared` is the paper's gamma x the sum of their squares.
  * ties: exactly b(t) triplets are kept, the first of equals; the code's threshold may drop more.
  * tinit and tfinal are shares of the run, since the papers' are steps of runs of 3,450 to 85,900.
  * r0 above a matrix's smaller side is clipped to it: more orthogonal directions there are not.

The rank axis is the target b_T / matrices, the average rank in the end; r0 = 1.5 x that, rounded
up, unless `init_r` says otherwise. Trainable per matrix: r0 (m + n + 1).
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ballast.adapters import LowRank
from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.lowrank import attach_low_rank, target_shapes

declaration = Declaration(
    title="AdaLoRA",
    citation="Zhang et al., Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, "
    "ICLR 2023, arXiv:2303.10512",
    family="reparameterization",
    rank="average rank of the matrices after the last allocation; training starts with 1.5 x",
    merges=True,
    random_start=True,
    learning_rate=5e-4,
    learning_rate_source="the paper's Table 8 for MNLI, QQP and CoLA (up to 2.2e-3 on small tasks)",
)


@dataclass(frozen=True)
class Hyper:
    alpha: float = hyper(32.0, "the released scripts of five of eight tasks; 16 on three", low=0.0)
    dropout: float = hyper(0.0, "loralib's default", low=0.0, high=0.99)
    init_r: int = hyper(0, "0: 1.5 x the rank (paper), rounded up", low=0)
    tinit: float = hyper(0.13, "median of the paper's eight tasks, 0.09 to 0.18", low=0.0, high=1.0)
    tfinal: float = hyper(
        0.47, "median of the paper's eight tasks, 0.44 to 0.58", low=0.0, high=1.0
    )
    delta_t: int = hyper(1, "the paper's in its shortest runs; 10 or 100 in longer ones", low=1)
    beta1: float = hyper(0.85, "paper", low=0.0, high=1.0)
    beta2: float = hyper(0.85, "paper", low=0.0, high=1.0)
    gamma: float = hyper(0.1, "the paper's for six of eight tasks", low=0.0)
    orthogonality: str = hyper("norm", "the code; squared: the paper", choices=("norm", "squared"))

    def __post_init__(self) -> None:
        if self.tinit + self.tfinal >= 1:
            raise ValueError(
                f"tinit + tfinal: {self.tinit} + {self.tfinal}; the shares of the run before and "
                "after pruning must leave some of it: below 1 together"
            )
        if 1 in (self.beta1, self.beta2):
            raise ValueError("beta1, beta2: 1; an average that never moves, below 1 is needed")


class Triplets(LowRank):
    """LowRank with lambda, s B diag(E) A; `kept` [r0] tells the triplets of the last allocation."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank, scale, dropout)
        self.E = nn.Parameter(self.A.detach().new_zeros(rank))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool, device=self.A.device))

    def up(self) -> Tensor:
        """P diag(lambda) [m, r0]."""
        return self.B * self.E

    def factors(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """lambda [r0], P [m, r0], Q [r0, n]."""
        return self.E, self.B, self.A


def initial_rank(ctx: Context, rank: int) -> int:
    """r0 before any clipping to a matrix."""
    return ctx.hyper.init_r or math.ceil(1.5 * rank)


def attach(ctx: Context) -> None:
    attach_triplets(ctx, Triplets)


def attach_triplets(ctx: Context, kind: type[Triplets], **options: Any) -> None:
    """Replace every target by a layer of this kind, r0 triplets in each.

    Raises SuiteError where r0 leaves nothing to prune.
    """
    start = initial_rank(ctx, ctx.rank or 0)
    scale = ctx.hyper.alpha / (start + 1e-5)
    if ctx.hyper.init_r and start <= (ctx.rank or 0):
        raise SuiteError(
            f"init_r: {start} is not above the rank {ctx.rank}, the average that is to be left; "
            f"give at least {(ctx.rank or 0) + 1}, or 0 for 1.5 x the rank"
        )

    def layer(base: nn.Module, rank: int, scale: float, dropout: float) -> Triplets:
        return kind(base, min(start, *base.weight.shape), scale, dropout, **options)

    attach_low_rank(ctx, scale, ctx.hyper.dropout, layer)
    if sum(starts(ctx)) <= target_budget(ctx):
        raise SuiteError(
            f"rank {ctx.rank}: no matrix is large enough to start above it, so that nothing could "
            "be pruned; a smaller rank is needed"
        )


@torch.no_grad()
def initialise(ctx: Context) -> None:
    for layer in layers(ctx):
        for factor in (layer.B, layer.A):
            drawn = torch.randn(factor.shape, generator=ctx.generator, dtype=factor.dtype)
            factor.copy_(0.02 * drawn)


def penalty(ctx: Context) -> Tensor | None:
    if not ctx.hyper.gamma:
        return None
    squared = ctx.hyper.orthogonality == "squared"
    distances = []
    for layer in layers(ctx):
        for gram in (layer.B.T @ layer.B, layer.A @ layer.A.T):
            away = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            # vector_norm has gradient 0 at an orthogonal factor, where a plain root has NaN.
            distances.append(away.square().sum() if squared else torch.linalg.vector_norm(away))
    total = torch.stack(distances)
    return ctx.hyper.gamma * (total.sum() if squared else total.mean())


@torch.no_grad()
def after_step(ctx: Context) -> None:
    step, (begin, end) = ctx.step, pruning_phase(ctx)
    if step < end or step == 1:
        _watch(ctx)
    if step == end or (begin < step < end and step % ctx.hyper.delta_t == 0):
        _allocate(ctx, budget(ctx, step))
    if step == end:
        for key in ("sensitivity", "uncertainty"):
            del ctx.state[key]
    if step > end:
        for layer in layers(ctx):
            layer.E.masked_fill_(~layer.kept, 0.0)


@torch.no_grad()
def restored(ctx: Context) -> None:
    for key in ("sensitivity", "uncertainty"):
        if key in ctx.state:
            ctx.state[key] = ctx.state[key].to(layers(ctx)[0].A.device)


def pruning_phase(ctx: Context) -> tuple[int, int]:
    """(t_i, T - t_f): pruning starts after the first and ends with the second, at least 1."""
    total = ctx.total_steps
    return int(ctx.hyper.tinit * total), total - int(ctx.hyper.tfinal * total)


def budget(ctx: Context, step: int) -> int:
    """b(t): how many triplets of all matrices together are kept after a step."""
    begin, end = pruning_phase(ctx)
    first, last = sum(starts(ctx)), target_budget(ctx)
    if step <= begin:
        return first
    if step >= end:
        return last
    return int(last + (first - last) * (1 - (step - begin) / (end - begin)) ** 3)


def target_budget(ctx: Context) -> int:
    """b_T, triplets of all matrices together in the end."""
    return (ctx.rank or 0) * len(ctx.targets)


def starts(ctx: Context, rank: int | None = None) -> list[int]:
    """r0 of every matrix, clipped to what it allows."""
    start = initial_rank(ctx, rank or ctx.rank or 0)
    return [min(start, *shape) for shape in target_shapes(ctx)]


def layers(ctx: Context) -> list[Triplets]:
    return [layer for _, layer in ctx.adapters()]


def _watch(ctx: Context) -> None:
    """Take the step's sensitivities |w g| into the averages, one flat vector for all entries."""
    parts = []
    for layer in layers(ctx):
        for p in layer.factors():
            parts.append((torch.zeros_like(p) if p.grad is None else p * p.grad).flatten())
    now = torch.cat(parts).abs_()
    if "sensitivity" not in ctx.state:
        ctx.state |= {"sensitivity": torch.zeros_like(now), "uncertainty": torch.zeros_like(now)}
    sensitivity, uncertainty = ctx.state["sensitivity"], ctx.state["uncertainty"]
    sensitivity.lerp_(now, 1 - ctx.hyper.beta1)
    uncertainty.lerp_(now.sub_(sensitivity).abs_(), 1 - ctx.hyper.beta2)


def _allocate(ctx: Context, kept: int) -> None:
    """Keep the triplets of largest importance in all matrices together."""
    found = layers(ctx)
    entries = ctx.state["sensitivity"] * ctx.state["uncertainty"]
    parts = iter(entries.split([p.numel() for layer in found for p in layer.factors()]))
    scores = []
    for layer in found:
        e, b, a = (next(parts).view(p.shape) for p in layer.factors())
        scores.append(e + b.mean(0) + a.mean(1))
    order = torch.cat(scores).argsort(descending=True, stable=True)
    mask = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    mask[order[:kept]] = True
    for layer, part in zip(found, mask.split([len(score) for score in scores]), strict=True):
        layer.kept.copy_(part)
        layer.E.masked_fill_(~part, 0.0)


def report(ctx: Context) -> dict[str, float]:
    """The rank map: what is left of every matrix, by role, and in all."""
    found = {name: int(layer.kept.sum()) for name, layer in ctx.adapters()}
    roles = defaultdict(list)
    for name, rank in found.items():
        other = "connector" if ctx.in_connector(name) else "other"
        roles[ctx.anatomy.role(name) or other].append(rank)
    parameters = sum(found[n] * (sum(a.base.weight.shape) + 1) for n, a in ctx.adapters())
    return {
        "rank_total": sum(found.values()),
        "rank_total_at_start": sum(starts(ctx)),
        "rank_total_asked": target_budget(ctx),
        "rank_min": min(found.values()),
        "rank_max": max(found.values()),
        "last_allocation_step": pruning_phase(ctx)[1],
        "kept_parameters": parameters,
        **{f"rank_mean.{role}": sum(ranks) / len(ranks) for role, ranks in roles.items()},
        **{f"rank.{name}": rank for name, rank in found.items()},
    }


def total_parameters(ctx: Context, rank: int) -> int:
    shapes = target_shapes(ctx)
    return sum(r * (m + n + 1) for r, (m, n) in zip(starts(ctx, rank), shapes, strict=True))
