"""Diff pruning: a dense difference to the base that learns, entry by entry, to be absent.

    theta = theta0 + z o w,   u ~ U(0, 1),   sbar = sigmoid(log u - log(1 - u) + alpha)
    z = min(1, max(0, sbar (hi - lo) + lo)),   lo = -1.5,  hi = 1.5   (stretched hard-concrete)
    L = L_task + l0 E||z||_0,   E||z||_0 = sum sigmoid(alpha - log(-lo / hi))

`structured` multiplies by a second gate per matrix, z_g z, whose open probability multiplies the
entry's in E||.||_0 (the paper; the released code adds the two sums). Evaluation, merging and
pruning use the gate without noise, sbar = sigmoid(alpha) (the released code evaluates with a
sample). After `fraction` of the run the `keep` share of entries with the largest |z w|, over all
matrices, stays: w <- z w there and 0 elsewhere, the gates are done, and w trains on at these
places alone. The paper has a second run of its own for that (at 5e-5 against 1e-5 before); here
both phases share the run's steps, rate and schedule. u is drawn once per step, not per micro-batch.

The gates' rate is absolute, 0.1 at the peak: how far a logit travels has no measure in w's rate. l0
is the paper's for the 3.3e8 parameters of BERT-large: E||z||_0 is a *sum*, so that a base of 1e5
needs a larger one to close gates at all; pruning makes the update sparse in any case.
The linears of the decoder layers have differences; the paper gives one to every parameter.
Trainable per matrix: 2 m n, and 1 if structured, dense gradients and moments; kept: keep x sum m n.

Small bases: what is kept is 0.5 % here too, 1,661 entries of micro-lm, and half of a run of 200
steps is over before they are chosen: about 2 % exact at any rate (`fish` has the same number).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ballast.adapters import Adapter, adapter_dtype
from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.lowrank import target_shapes
from ballast.sparse import largest_overall, refuse_embeddings

LEAST = 1e-4  # u stays inside (LEAST, 1 - LEAST), as released: log 0 is no number

declaration = Declaration(
    title="Diff pruning",
    citation="Guo, Rush and Kim, Parameter-Efficient Transfer Learning with Diff Pruning, "
    "ACL 2021, arXiv:2012.07463",
    family="reparameterization",
    merges=True,
    random_start=True,
    learning_rate=1e-5,
    learning_rate_source="the released code, for BERT-large on GLUE",
)


@dataclass(frozen=True)
class Hyper:
    keep: float = hyper(0.005, "0.5 % of the parameters (paper)", low=1e-6, high=1.0)
    structured: bool = hyper(True, "per_params_alpha, the paper's better variant")
    l0: float = hyper(1.25e-7, "lambda for BERT-large (paper)", low=0.0)
    fraction: float = hyper(
        0.5, "of the run before pruning, chosen here: the paper has two runs", low=0.0, high=1.0
    )
    gate_learning_rate: float = hyper(0.1, "of the gates' logits (released code)", low=0.0)
    alpha: float = hyper(5.0, "alpha_init (released code): gates start open")
    lower: float = hyper(-1.5, "lo (paper)", high=-1e-3)
    upper: float = hyper(1.5, "hi (paper)", low=1.001)


class Gated(Adapter):
    """y = (W0 + z_g z o w) x on a Linear; after pruning y = (W0 + mask o w) x.

    seed: of this step's noise. The noise is made again from it wherever it is needed (a second
    forward under gradient checkpointing must see the same), and is never kept.
    """

    def __init__(self, base: nn.Module, hyper: Hyper) -> None:
        super().__init__(base)
        kind = {"dtype": adapter_dtype(base.weight), "device": base.weight.device}
        self.lower, self.upper = hyper.lower, hyper.upper
        self.w = nn.Parameter(torch.zeros(base.weight.shape, **kind))
        self.alpha = nn.Parameter(torch.full(base.weight.shape, hyper.alpha, **kind))
        group = torch.full((1,), hyper.alpha, **kind)
        self.alpha_group = nn.Parameter(group) if hyper.structured else None
        self.register_buffer("mask", None)
        self.seed: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        return F.linear(x, self._weight().to(self.base.weight.dtype), self.base.bias)

    def _weight(self) -> Tensor:
        return self.base.weight.to(self.w.dtype) + self.difference(noisy=self.training)

    def difference(self, noisy: bool) -> Tensor:
        """The update of W0 [m, n], with this step's noise or without."""
        if self.mask is not None:
            return self.w * self.mask
        return self.gate(noisy) * self.w

    def gate(self, noisy: bool) -> Tensor:
        """z, or z_g z, in [0, 1]."""
        generator = None
        if noisy:
            generator = torch.Generator(self.w.device).manual_seed(self.seed)
        gate = hard_concrete(self.alpha, self.lower, self.upper, _uniform(self.alpha, generator))
        if self.alpha_group is None:
            return gate
        noise = _uniform(self.alpha_group, generator)
        return gate * hard_concrete(self.alpha_group, self.lower, self.upper, noise)

    def expected_nonzeros(self) -> Tensor:
        """E||z||_0, a scalar."""
        open_ = open_probability(self.alpha, self.lower, self.upper).sum()
        if self.alpha_group is not None:
            open_ = open_ * open_probability(self.alpha_group, self.lower, self.upper).squeeze()
        return open_

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return self.base.weight.to(self.w.dtype) + self.difference(noisy=False)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor | None:
    if generator is None:
        return None
    kind = {"dtype": like.dtype, "device": like.device}
    return torch.rand(like.shape, generator=generator, **kind).clamp(LEAST, 1 - LEAST)


def hard_concrete(alpha: Tensor, lower: float, upper: float, u: Tensor | None) -> Tensor:
    """z in [0, 1] from logits alpha and noise u in (0, 1); without u the gate without noise."""
    logits = alpha if u is None else alpha + torch.logit(u)
    return (torch.sigmoid(logits) * (upper - lower) + lower).clamp(0, 1)


def open_probability(alpha: Tensor, lower: float, upper: float) -> Tensor:
    """P(z > 0)."""
    return torch.sigmoid(alpha - math.log(-lower / upper))


def attach(ctx: Context) -> None:
    refuse_embeddings(ctx)
    for name in ctx.targets:
        ctx.replace(name, Gated(ctx.model.get_submodule(name), ctx.hyper))


def initialise(ctx: Context) -> None:
    ctx.state["seed"] = int(torch.randint(2**31, (1,), generator=ctx.generator))
    _draw(ctx, 0)


def restored(ctx: Context) -> None:
    _draw(ctx, int(ctx.state["drawn"]))


def parameter_groups(ctx: Context) -> list[dict[str, Any]]:
    weights = [f"{name}.w" for name, _ in ctx.adapters()]
    gates = [name for name in ctx.own() if name not in set(weights)]
    # Decay would move entries that the mask holds at zero, and pull gates half open.
    return [
        {"params": weights, "weight_decay": 0.0},
        {
            "params": gates,
            "lr_scale": ctx.hyper.gate_learning_rate / ctx.learning_rate,
            "weight_decay": 0.0,
        },
    ]


def penalty(ctx: Context) -> Tensor | None:
    parts = [layer.expected_nonzeros() for _, layer in ctx.adapters() if layer.mask is None]
    return ctx.hyper.l0 * torch.stack(parts).sum() if parts else None


@torch.no_grad()
def after_step(ctx: Context) -> None:
    _draw(ctx, ctx.step)
    if ctx.step == pruning_step(ctx):
        _prune(ctx)
    for _, layer in ctx.adapters():
        if layer.mask is not None:
            # Adam's moments from before the pruning still move pruned entries.
            layer.w.mul_(layer.mask)


def pruning_step(ctx: Context) -> int:
    """The optimiser step after which the mask is made, from 1 on."""
    return max(1, min(ctx.total_steps, round(ctx.hyper.fraction * ctx.total_steps)))


def _draw(ctx: Context, step: int) -> None:
    """Give every matrix the seed of its noise in a step."""
    ctx.state["drawn"] = step
    layers = [layer for _, layer in ctx.adapters()]
    for place, layer in enumerate(layers):
        layer.seed = int(ctx.state["seed"]) + step * len(layers) + place


def _prune(ctx: Context) -> None:
    sizes = {name: layer.difference(noisy=False).abs() for name, layer in ctx.adapters()}
    masks = largest_overall(sizes, _count(ctx, sum(size.numel() for size in sizes.values())))
    for name, layer in ctx.adapters():
        layer.w.copy_(layer.gate(noisy=False) * layer.w)
        layer.mask = masks[name]


def _count(ctx: Context, candidates: int) -> int:
    return max(1, int(ctx.hyper.keep * candidates))


def total_parameters(ctx: Context, size: int | None = None) -> int:
    shapes = target_shapes(ctx)
    gates = len(shapes) if ctx.hyper.structured else 0
    return gates + sum(2 * m * n for m, n in shapes)


@torch.no_grad()
def report(ctx: Context) -> dict[str, float]:
    layers = [layer for _, layer in ctx.adapters()]
    total = sum(layer.w.numel() for layer in layers)
    nonzero = sum(int(torch.count_nonzero(layer.difference(noisy=False))) for layer in layers)
    expected = sum(float(layer.expected_nonzeros()) for layer in layers)
    return {
        "pruning_step": pruning_step(ctx),
        "nonzero": nonzero,
        "nonzero_share": nonzero / total,
        # Of the gates as pruning found them: they have not moved since.
        "expected_open_share": expected / total,
    }
