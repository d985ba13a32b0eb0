"""Last-ST: the k decoder layers nearest the output train in full (Top-ST on layers[-k:]).

Trainable: all parameters of k decoder layers.
"""

from __future__ import annotations

from ballast.context import Context
from ballast.declare import Declaration
from ballast.selective import connector_parameters, layer_count, parameters_of, tune_layers

from .full_st import initialise  # noqa: F401
from .top_st import Hyper  # noqa: F401

declaration = Declaration(
    title="Last-ST",
    citation="Huang et al., Keeping Yourself is Important in Downstream Tuning Multimodal Large "
    "Language Model, 2025, arXiv:2503.04543",
    family="selective",
    merges=True,
    learning_rate=2e-4,
    learning_rate_source="the same laboratory's scripts for two decoder layers (SPIDER, NRCA)",
)


def chosen(ctx: Context) -> list[str]:
    names = ctx.anatomy.layer_names(ctx.model)
    return names[-layer_count(ctx.hyper.layers, len(names)) :]


def attach(ctx: Context) -> None:
    tune_layers(ctx, chosen(ctx), ctx.hyper.connector_rank)


def total_parameters(ctx: Context, size: int | None = None) -> int:
    layers = parameters_of(ctx, chosen(ctx))
    return layers + connector_parameters(ctx, ctx.hyper.connector_rank)


def report(ctx: Context) -> dict[str, float]:
    return {"tuned_layers": len(chosen(ctx))}
