"""LISA: all decoder layers are frozen but `active` random ones, drawn anew every few steps.

    every K steps: freeze all layers, draw n of them uniformly without replacement, train these in
    full; the embedding and the head train in every step

K = min(interval, fraction x steps): the code's 20 steps would be a fifth of a short run. Layers
that are frozen ask for no gradient and get no update, decay included; a layer that is drawn again
goes on with the moments of Adam that it left with (the released code rebuilds the optimiser, and so
forgets them; so it does not for what always trains). `embeddings: false` keeps embedding and head
frozen, as the other selective methods here do; the code trains the final norm as well, the paper
does not. Trainable: all parameters of the decoder layers, of the embedding and of the head; in a
step n of L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.selective import parameters_of, tune_all

declaration = Declaration(
    title="LISA",
    citation="Pan et al., LISA: Layerwise Importance Sampling for Memory-Efficient Large Language "
    "Model Fine-Tuning, NeurIPS 2024, arXiv:2403.17919",
    family="selective",
    merges=True,
    random_start=True,
    learning_rate=5e-5,
    learning_rate_source="within the 1e-5 to 1e-4 of the paper's search",
    alternates=True,
)


@dataclass(frozen=True)
class Hyper:
    active: int = hyper(2, "n, layers that train at once (LMFlow)", low=1)
    interval: int = hyper(20, "K, LMFlow's default", low=1)
    fraction: float = hyper(
        0.05, "of the run between two draws at most, chosen here for short runs", low=1e-6, high=1.0
    )
    embeddings: bool = hyper(True, "embedding and head always train (paper)")


def attach(ctx: Context) -> None:
    count = len(ctx.anatomy.layer_names(ctx.model))
    if ctx.hyper.active > count:
        raise SuiteError(f"active: {ctx.hyper.active}; the base has {count} decoder layers")
    tune_all(ctx)
    for parameter in _always(ctx):
        parameter.requires_grad_(True)


def initialise(ctx: Context) -> None:
    count, periods = len(ctx.anatomy.layer_names(ctx.model)), -(-ctx.total_steps // period(ctx))
    orders = [torch.randperm(count, generator=ctx.generator) for _ in range(periods)]
    ctx.state["draws"] = torch.stack([order[: ctx.hyper.active].sort().values for order in orders])
    _switch(ctx, 0)


def restored(ctx: Context) -> None:
    _switch(ctx, int(ctx.state["period"]))


def after_step(ctx: Context) -> None:
    if ctx.step % period(ctx) == 0 and ctx.step < ctx.total_steps:
        _switch(ctx, ctx.step // period(ctx))


def period(ctx: Context) -> int:
    """K: optimiser steps from one draw to the next."""
    return max(1, min(ctx.hyper.interval, round(ctx.hyper.fraction * ctx.total_steps)))


def _switch(ctx: Context, number: int) -> None:
    """Let the layers of a period's draw train, and no others."""
    ctx.state["period"] = number
    drawn = set(ctx.state["draws"][number].tolist())
    for i, name in enumerate(ctx.anatomy.layer_names(ctx.model)):
        for parameter in ctx.model.get_submodule(name).parameters():
            parameter.requires_grad_(i in drawn)
            if i not in drawn:
                parameter.grad = None


def _always(ctx: Context) -> list[torch.nn.Parameter]:
    """Parameters of the input embedding and the head, a tied one once."""
    if not ctx.hyper.embeddings:
        return []
    parts = (ctx.model.get_input_embeddings(), ctx.model.get_output_embeddings())
    found = [p for part in parts if part is not None for p in part.parameters()]
    return list({id(p): p for p in found}.values())


def total_parameters(ctx: Context, size: int | None = None) -> int:
    layers = parameters_of(ctx, ctx.anatomy.layer_names(ctx.model))
    return layers + sum(p.numel() for p in _always(ctx))


def report(ctx: Context) -> dict[str, float]:
    draws = ctx.state["draws"]
    return {
        "period": period(ctx),
        "active_layers": ctx.hyper.active,
        "layers_ever_active": len(draws.unique()),
    }
