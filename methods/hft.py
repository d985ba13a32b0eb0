"""HFT (half fine-tuning): a random half of every layer's matrices trains, the other half is frozen.

    per round and layer: 2 of q, k, v, o;  1 or 2 of gate, up, down;  1 of the 2 norms   train

A category with an odd number of modules gives the larger part in a random half of the layers and
the smaller in the others, so that over the layers half of each category trains. A bias goes with
its matrix. The paper draws anew in every round of training (a stage of its continual learning, an
epoch); here a round is the `fraction` of the run, since short runs have neither. A frozen module
asks for no gradient, which saves its part of the backward pass; Adam's moments of a module that
comes back are those that it left with. Embeddings, final norm and head stay frozen, as in Full-ST.
Trainable: all parameters of the decoder layers, half of them in a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.selective import parameters_of, tune_all

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")

declaration = Declaration(
    title="Half fine-tuning",
    citation="Hui et al., HFT: Half Fine-Tuning for Large Language Models, ACL 2025, "
    "arXiv:2404.18466",
    family="selective",
    merges=True,
    random_start=True,
    learning_rate=2e-5,
    learning_rate_source="that of Full-ST, which the paper keeps for HFT",
    alternates=True,
)


@dataclass(frozen=True)
class Hyper:
    share: float = hyper(0.5, "p of the paper, which finds 0.5 best", low=0.01, high=1.0)
    fraction: float = hyper(0.25, "of the run between two draws, chosen here", low=1e-6, high=1.0)


def attach(ctx: Context) -> None:
    tune_all(ctx)
    ctx.scratch["modules"] = modules(ctx)


def initialise(ctx: Context) -> None:
    count = -(-ctx.total_steps // round_length(ctx))
    ctx.state["draws"] = torch.stack([_draw(ctx) for _ in range(count)])
    _switch(ctx, 0)


def restored(ctx: Context) -> None:
    _switch(ctx, int(ctx.state["round"]))


def after_step(ctx: Context) -> None:
    if ctx.step % round_length(ctx) == 0 and ctx.step < ctx.total_steps:
        _switch(ctx, ctx.step // round_length(ctx))


def round_length(ctx: Context) -> int:
    """Optimiser steps from one draw to the next."""
    return max(1, round(ctx.hyper.fraction * ctx.total_steps))


def modules(ctx: Context) -> list[tuple[int, str, list[str]]]:
    """What is frozen or trained as one: (layer, category, names of its parameters)."""
    found = []
    for layer, name in enumerate(ctx.anatomy.layer_names(ctx.model)):
        for inner, module in ctx.model.get_submodule(name).named_modules():
            own = [key for key, _ in module.named_parameters(recurse=False)]
            if own:
                full = f"{name}.{inner}"
                found.append((layer, _category(ctx, full), [f"{full}.{key}" for key in own]))
    return found


def _category(ctx: Context, name: str) -> str:
    role = ctx.anatomy.role(name)
    if role in ATTENTION:
        return "attention"
    return "mlp" if role in MLP else "norm"


def _draw(ctx: Context) -> Tensor:
    """Which modules train in a round, bool [modules]: balanced per layer and category."""
    units = ctx.scratch["modules"]
    chosen = torch.zeros(len(units), dtype=torch.bool)
    for category in sorted({category for _, category, _ in units}):
        members: dict[int, list[int]] = {}
        for place, (layer, own, _) in enumerate(units):
            if own == category:
                members.setdefault(layer, []).append(place)
        order = torch.randperm(len(members), generator=ctx.generator).tolist()
        for layer, rank in zip(members, order, strict=True):
            places = torch.tensor(members[layer])
            wanted = ctx.hyper.share * len(places)
            # The layers that round up are those that make the total come out even.
            count = int(wanted * (rank + 1) + 1e-9) - int(wanted * rank + 1e-9)
            picked = torch.randperm(len(places), generator=ctx.generator)[:count]
            chosen[places[picked]] = True
    return chosen


def _switch(ctx: Context, number: int) -> None:
    """Let the modules of a round's draw train."""
    ctx.state["round"] = number
    draw = ctx.state["draws"][number].tolist()
    for trains, (_, _, names) in zip(draw, ctx.scratch["modules"], strict=True):
        for name in names:
            parameter = ctx.model.get_parameter(name)
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None


def total_parameters(ctx: Context, size: int | None = None) -> int:
    return parameters_of(ctx, ctx.anatomy.layer_names(ctx.model))


def report(ctx: Context) -> dict[str, float]:
    sizes = [
        sum(ctx.model.get_parameter(name).numel() for name in names)
        for _, _, names in ctx.scratch["modules"]
    ]
    draws = ctx.state["draws"].double()
    active = draws @ torch.tensor(sizes, dtype=torch.float64)
    return {"rounds": len(draws), "share_in_a_step": float(active.mean()) / sum(sizes)}
