"""Low-rank heads that a router mixes per token: what Crab, HydraLoRA and MoE-LoRA share.

    y = W0 x + s sum_i p_i(x) B_i A_i x,   p(x) = softmax(R x) over N heads, in fp32

R [N, n] is a router on the layer's own input. A is one [r, n] that the heads share, or one per
head; the B_i stand side by side, B = [B_1 .. B_N] [m, N r], so that the sum over heads is one
product with the heads' inputs scaled by p: two matmuls and no loop, whatever N.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ballast.adapters import Adapter, adapter_dtype
from ballast.context import Context
from ballast.errors import SuiteError
from ballast.lowrank import attach_low_rank

EXAMPLES_FOR_USE = 32  # per task: hundreds of tokens, and a second on a small model


class Experts(Adapter):
    """N heads of inner dimension `rank` on a Linear, mixed per token.

    A [rank, n] if the heads share it, else [N rank, n]; B [m, N rank]; R [N, n].
    watch, where set, is called with the weights p [..., N] of every forward.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        *,
        heads: int,
        shared: bool,
    ) -> None:
        super().__init__(base)
        if rank < 1 or heads < 1:
            raise ValueError(f"rank {rank}, heads {heads}: at least 1 of each is needed")
        if not isinstance(base, nn.Linear):
            raise ValueError(f"{type(base).__name__}: only Linear can be adapted by experts")
        m, n = base.weight.shape
        kind = {"dtype": adapter_dtype(base.weight), "device": base.weight.device}
        self.rank, self.heads, self.scale, self.dropout = rank, heads, scale, dropout
        self.A = nn.Parameter(torch.zeros(rank if shared else heads * rank, n, **kind))
        self.B = nn.Parameter(torch.zeros(m, heads * rank, **kind))
        self.R = nn.Parameter(torch.zeros(heads, n, **kind))
        self.watch: Callable[[Tensor], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        rows = x.flatten(0, -2)
        y = self.base(rows)
        low, p = self._low_and_weights(rows, plain=y.dtype == self.A.dtype)
        if self.watch is not None:
            self.watch(p.view(*x.shape[:-1], self.heads))
        # [T, 1 or N, r] * [T, N, 1]: each head's input, scaled by its weight.
        mixed = (low.view(len(rows), -1, self.rank) * p.unsqueeze(-1)).flatten(1)
        if y.dtype == self.A.dtype:
            y = y.addmm_(mixed, self.B.T, alpha=self.scale)
        else:
            y = y + F.linear(self.scale * mixed, self.B).to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _low_and_weights(self, x: Tensor, plain: bool) -> tuple[Tensor, Tensor]:
        """A x [T, rows of A] and p [T, N] for rows x [T, n]."""
        if plain and not (self.dropout and self.training):
            # One pass over x and one over its gradient for both.
            both = F.linear(x, torch.cat((self.A, self.R)))
            low, scores = both.split([len(self.A), self.heads], dim=1)
            return low, scores.softmax(-1)
        x = x.to(self.A.dtype)
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x, self.R).softmax(-1)
        return F.linear(F.dropout(x, self.dropout, self.training), self.A), p


def attach_experts(
    ctx: Context, heads: int, targets: Sequence[str] | None = None, *, shared: bool
) -> None:
    """Replace every target by `heads` heads: of the cell's rank each, or splitting it among them.

    targets: some of the context's, all by default. Heads that share A have the rank each, others
    split it. Raises SuiteError for embeddings, for a rank that cannot be split evenly, and as
    `attach_low_rank`.
    """
    chosen = tuple(ctx.targets if targets is None else targets)
    for name in chosen:
        if not isinstance(ctx.model.get_submodule(name), nn.Linear):
            raise SuiteError(
                f"modules: {name} is an embedding, which has no input to route by; "
                "name linear modules only"
            )

    def layer(base: nn.Module, rank: int, scale: float, dropout: float) -> Experts:
        each = rank if shared else max(1, rank // heads)
        return Experts(base, each, scale, dropout, heads=heads, shared=shared)

    hyper = ctx.hyper
    attach_low_rank(replace(ctx, targets=chosen), hyper.alpha_over_r, hyper.dropout, layer)
    if not shared and ctx.rank % heads:
        raise SuiteError(
            f"rank {ctx.rank}: {heads} experts cannot split it evenly; "
            f"a multiple of {heads}, or another number of experts, is needed"
        )
    if hyper.balance:
        ctx.scratch["loads"] = {}
        for name, module in ctx.adapters():
            module.watch = partial(_keep_loads, ctx.scratch["loads"], name)


@torch.no_grad()
def start_experts(ctx: Context) -> None:
    """A and R uniform in +-1/sqrt(n), B = 0, as in HydraLoRA's, Crab's and LoRAMoE's code."""
    for _, layer in ctx.adapters():
        for parameter in (layer.A, layer.R):
            start = torch.empty(parameter.shape, dtype=parameter.dtype)
            nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=ctx.generator)
            parameter.copy_(start)
        layer.B.zero_()


def expert_parameters(
    ctx: Context, targets: Sequence[str], rank: int, heads: int, *, shared: bool
) -> int:
    """Trainable numbers of `heads` heads of inner dimension `rank` and a router on each target."""
    total = 0
    for name in targets:
        module = ctx.model.get_submodule(name)
        m, n = getattr(module, "base", module).weight.shape
        total += rank * n * (1 if shared else heads) + heads * rank * m + heads * n
    return total


def balance_penalty(ctx: Context) -> Tensor | None:
    """balance x sum over layers of cv^2 of the heads' loads in the last forward; None without."""
    if not ctx.hyper.balance:
        return None
    loads = ctx.scratch["loads"]
    penalty = ctx.hyper.balance * torch.stack([cv_squared(load) for load in loads.values()]).sum()
    loads.clear()
    return penalty


def forget_loads(ctx: Context) -> None:
    """Drop what a recomputed forward left: its graph would keep all activations to the next one."""
    ctx.scratch.get("loads", {}).clear()


def cv_squared(loads: Tensor) -> Tensor:
    """Squared coefficient of variation, variance over squared mean, of all entries of `loads`."""
    return loads.var() / (loads.mean().square() + 1e-10)


def _keep_loads(kept: dict[str, Tensor], name: str, p: Tensor) -> None:
    """Sum of the weights over an example's tokens: [examples, N] of p [examples, tokens, N]."""
    if torch.is_grad_enabled():
        kept[name] = p.sum(-2) if p.ndim > 2 else p.sum(0, keepdim=True)


class _Use:
    """Mean weight per head [N] and mean entropy of a token's weights, over the tokens seen."""

    def __init__(self, heads: int) -> None:
        self.total = torch.zeros(heads, dtype=torch.float64)
        self.entropy, self.tokens = 0.0, 0
        self.mask: Tensor | None = None

    def __call__(self, p: Tensor) -> None:
        rows = p.flatten(0, -2)
        if self.mask is not None and self.mask.numel() == len(rows):  # padding uses no head
            rows = rows[self.mask.flatten().bool()]
        self.total += rows.sum(0, dtype=torch.float64).cpu()
        self.entropy += float(torch.special.entr(rows).sum(dtype=torch.float64))
        self.tokens += len(rows)

    def mean(self) -> Tensor:
        return self.total / max(1, self.tokens)


@torch.no_grad()
def head_use(ctx: Context) -> dict[str, float]:
    """How the routers use their heads on each task of the target, measured on training examples.

    use.TASK.headI: mean weight of head I over tokens and layers; use.TASK.entropy: mean entropy of
    a token's weights, nats, log N where the router is indifferent; use.divergence, for a mixture:
    Jensen-Shannon divergence of the tasks' mean weights within a layer, averaged over layers,
    nats, 0 where every task uses the heads alike (head I of one layer is unrelated to head I of
    another, so that tasks may differ more than the means over layers show).
    Empty if there are no examples to measure on.
    """
    if ctx.batches is None or not ctx.tasks:
        return {}
    found: dict[str, float] = {}
    per_task: list[list[Tensor]] = []
    was_training = ctx.model.training
    ctx.model.eval()
    for task in ctx.tasks:
        uses = _measure(ctx, task)
        if not any(use.tokens for use in uses):
            continue
        means = [use.mean() for use in uses]
        for head, weight in enumerate(torch.stack(means).mean(0).tolist()):
            found[f"use.{task}.head{head}"] = weight
        entropies = [use.entropy / max(1, use.tokens) for use in uses]
        found[f"use.{task}.entropy"] = sum(entropies) / len(entropies)
        per_task.append(means)
    ctx.model.train(was_training)
    if len(per_task) > 1:
        layers = zip(*per_task, strict=True)
        divergences = [_jensen_shannon(torch.stack(layer)) for layer in layers]
        found["use.divergence"] = sum(divergences) / len(divergences)
    return found


def _measure(ctx: Context, task: str) -> list[_Use]:
    """One `_Use` per adapted layer, over some examples of a task."""
    layers = [layer for _, layer in ctx.adapters()]
    uses, watched = [_Use(layer.heads) for layer in layers], [layer.watch for layer in layers]
    for layer, use in zip(layers, uses, strict=True):
        layer.watch = use
    assert ctx.batches is not None
    for batch in ctx.batches(EXAMPLES_FOR_USE, task):
        for use in uses:
            use.mask = batch.get("attention_mask")
        ctx.model(**{key: value for key, value in batch.items() if key != "labels"})
    for layer, watch in zip(layers, watched, strict=True):
        layer.watch = watch
    return uses


def _jensen_shannon(weights: Tensor) -> float:
    """Entropy of the mean minus mean of the entropies of distributions [tasks, N], nats."""
    entropy = torch.special.entr
    return float(entropy(weights.mean(0)).sum() - entropy(weights).sum(1).mean())
