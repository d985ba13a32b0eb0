"""Full-ST: every decoder layer trains in full.

    theta <- theta - eta grad L,   theta = all parameters of all decoder layers

Embeddings, final norm and head stay frozen, as does the vision tower. The connector is frozen,
trains in full (`connector: tuned`), or trains LoRA adapters of rank `connector_rank` on its linears
beside the layers, at the same learning rate (`connector: adapted`). Trainable: all parameters of
the decoder layers, and connector_rank (m + n) per adapted matrix of the connector.
"""

from __future__ import annotations

from dataclasses import dataclass

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.selective import connector_parameters, parameters_of, start_connector, tune_all

declaration = Declaration(
    title="Full-ST",
    citation="Huang et al., Keeping Yourself is Important in Downstream Tuning Multimodal Large "
    "Language Model, 2025, arXiv:2503.04543",
    family="selective",
    merges=True,
    learning_rate=2e-5,
    learning_rate_source="full fine-tuning in PiSSA's protocol (arXiv:2404.02948, Table 2); the "
    "survey's own was not available",
)


@dataclass(frozen=True)
class Hyper:
    connector_rank: int = hyper(
        8,
        "chosen here: rank of LoRA on the connector where it is adapted; else without effect",
        low=1,
    )


def attach(ctx: Context) -> None:
    tune_all(ctx, ctx.hyper.connector_rank)


def initialise(ctx: Context) -> None:
    start_connector(ctx)


def total_parameters(ctx: Context, size: int | None = None) -> int:
    layers = parameters_of(ctx, ctx.anatomy.layer_names(ctx.model))
    return layers + connector_parameters(ctx, ctx.hyper.connector_rank)


def report(ctx: Context) -> dict[str, float]:
    return {"tuned_layers": len(ctx.anatomy.layer_names(ctx.model))}
