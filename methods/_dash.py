"""LoRA-Dash's mathematics: a low-rank method's update, and single directions of the weight itself.

    W0 = sum_i sigma_i u_i v_i^T                      (decomposed once, through the shared cache)
    W  = W0 + dW + sum_{i in I} dsigma_i u_i v_i^T,   dW the method's own update, with its scale

After `launch_step` optimiser steps the rate of change of every direction is read off,

    delta_i = |u_i^T dW v_i| / (|sigma_i| + 1e-6),

and I are the `directions` largest of each matrix, the *task-specific directions*. From then on
dsigma [directions] trains, from 0, at the method's rate, without a scale; u and v stay as they are.

What differs from the authors' code (Subspace-Tuning, layers_LoRA-Dash.py): the launch counts
optimiser steps, where the code counts forward calls (micro-batches, evaluations and recomputed
activations advance it); u, v and so the launch are stored with the adapter, where a checkpoint of
the code loses them; delta has the paper's 1e-6. dsigma belongs to the optimiser from the first
step; having no gradient before the launch, it is left alone by AdamW. The paper launches after 100
of some 31,000 steps; launch_step = min(100, fraction x steps), so that a short run launches too.

`pick` makes the paper's ablation: the directions of the largest or the smallest singular values, or
random ones, in place of the task-specific ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ballast.adapters import LoraForm, LowRank
from ballast.context import Context
from ballast.declare import hyper
from ballast.errors import SuiteError

EPSILON = 1e-6


@dataclass(frozen=True)
class Hyper:
    directions: int = hyper(8, "s' (paper and code)", low=1)
    launch: int = hyper(100, "t, in optimiser steps (paper and code)", low=1)
    fraction: float = hyper(0.1, "of the run, chosen here for short runs", low=0.0, high=1.0)
    pick: str = hyper(
        "tsd",
        "the paper's method; the others are its ablation",
        choices=("tsd", "top", "bottom", "random"),
    )


class Dash(LowRank):
    """Put before a layer of the low-rank family among a class's bases: adds the directions to it.

    u [m, directions] and v [directions, n] do not exist before the launch. On an Embedding, u
    belongs to the tokens and v to the features, as in its weight [V, d].
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        directions: int = 8,
    ) -> None:
        super().__init__(base, rank, scale, dropout)
        limit = min(base.weight.shape)
        if directions > limit:
            raise SuiteError(f"directions: {directions}; a {type(base).__name__} has only {limit}")
        self.dsigma = nn.Parameter(self.A.detach().new_zeros(directions))
        self.register_buffer("u", None)
        self.register_buffer("v", None)

    def _add_low(self, y: Tensor, x: Tensor) -> Tensor:
        y = super()._add_low(y, x)
        if self.u is None:
            return y
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        along = F.linear(x.to(self.v.dtype), self.v) * self.dsigma
        if y.dtype == self.v.dtype:
            return y.addmm_(along, self.u.T)
        return y + F.linear(along, self.u).to(y.dtype)

    def _low(self, tokens: Tensor) -> Tensor:
        low = super()._low(tokens)
        if self.u is None:
            return low
        return low + F.linear(F.embedding(tokens, self.u) * self.dsigma, self.v.T)

    def delta(self) -> Tensor:
        update = super().delta()
        return update if self.u is None else update + (self.u * self.dsigma) @ self.v

    @torch.no_grad()
    def as_lora(self) -> LoraForm:
        """The directions are further columns and rows: rank r + s'."""
        form = super().as_lora()
        if self.u is None:
            return form
        along, across = self.u * self.dsigma, self.v
        if self.is_embedding:
            along, across = self.v.T, (self.u * self.dsigma).T
        return LoraForm(torch.cat([form.a, across]), torch.cat([form.scale * form.b, along], 1))


def launch_step(ctx: Context) -> int:
    """The optimiser step after which the directions are chosen, from 1 on."""
    return max(1, min(ctx.hyper.launch, round(ctx.hyper.fraction * ctx.total_steps)))


@torch.no_grad()
def after_step(ctx: Context) -> None:
    if ctx.step != launch_step(ctx):
        return
    for _, layer in ctx.adapters():
        u, sigma, v = (part.to(layer.A) for part in ctx.cache.svd(layer.base.weight))
        chosen = choose(ctx, change_rates(u, sigma, v, layer.delta()))
        layer.u, layer.v = u[:, chosen].contiguous(), v[chosen].contiguous()


def change_rates(u: Tensor, sigma: Tensor, v: Tensor, update: Tensor) -> Tensor:
    """delta [k] of an update [m, n], for u [m, k], sigma [k] and v [k, n]."""
    return ((u.T @ update) * v).sum(1).abs() / (sigma.abs() + EPSILON)


def choose(ctx: Context, rates: Tensor) -> Tensor:
    """Indices of the directions that train, of singular values in descending order."""
    count, total = ctx.hyper.directions, len(rates)
    if ctx.hyper.pick == "top":
        return torch.arange(count, device=rates.device)
    if ctx.hyper.pick == "bottom":
        return torch.arange(total - count, total, device=rates.device)
    if ctx.hyper.pick == "random":
        return torch.randperm(total, generator=ctx.generator)[:count].to(rates.device)
    return rates.topk(count).indices


@torch.no_grad()
def report(ctx: Context) -> dict[str, float]:
    """Launch step, and how the update lies along the chosen directions, over all matrices.

    amplification: |u_i^T (W - W0) v_i| summed, relative to |sigma_i| summed (as LoRA's section 7.3
    measures an update along directions of the weight); dsigma_share: how much of the former dsigma
    itself is.
    """
    found = {"launch_step": launch_step(ctx)}
    layers = [layer for _, layer in ctx.adapters() if layer.u is not None]
    if layers:
        moved = sum(along(layer, layer.delta()).abs().sum().item() for layer in layers)
        was = sum(along(layer, layer.base.weight).abs().sum().item() for layer in layers)
        own = sum(layer.dsigma.abs().sum().item() for layer in layers)
        found |= {"amplification": moved / was, "dsigma_share": own / moved if moved else 0.0}
    return found


def along(layer: Dash, matrix: Tensor) -> Tensor:
    """u_i^T matrix v_i [directions] along a launched layer's directions."""
    return ((layer.u.T @ matrix.to(layer.u)) * layer.v).sum(1)
