"""Top-ST: the k decoder layers nearest the input train in full (Full-ST on layers[:k]).

The survey calls these layers the top: text and image first meet there. Its k was not available, so
it is a setting and stands in the record as `tuned_layers`. The connector is frozen, tuned or
adapted as in Full-ST. Trainable: all parameters of k decoder layers.
"""

from __future__ import annotations

from dataclasses import dataclass

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.selective import connector_parameters, layer_count, parameters_of, tune_layers

from .full_st import initialise  # noqa: F401

declaration = Declaration(
    title="Top-ST",
    citation="Huang et al., Keeping Yourself is Important in Downstream Tuning Multimodal Large "
    "Language Model, 2025, arXiv:2503.04543",
    family="selective",
    merges=True,
    learning_rate=2e-4,
    learning_rate_source="the same laboratory's scripts for two decoder layers (SPIDER, NRCA)",
)


@dataclass(frozen=True)
class Hyper:
    layers: float = hyper(
        0.25,
        "a quarter, chosen here (the survey's k is not known; SPIDER and NRCA use 2 of 32); "
        "below 1 a fraction of the layers, from 1 on their number",
        low=0.0,
    )
    connector_rank: int = hyper(
        8,
        "chosen here: rank of LoRA on the connector where it is adapted; else without effect",
        low=1,
    )


def chosen(ctx: Context) -> list[str]:
    names = ctx.anatomy.layer_names(ctx.model)
    return names[: layer_count(ctx.hyper.layers, len(names))]


def attach(ctx: Context) -> None:
    tune_layers(ctx, chosen(ctx), ctx.hyper.connector_rank)


def total_parameters(ctx: Context, size: int | None = None) -> int:
    layers = parameters_of(ctx, chosen(ctx))
    return layers + connector_parameters(ctx, ctx.hyper.connector_rank)


def report(ctx: Context) -> dict[str, float]:
    return {"tuned_layers": len(chosen(ctx))}
