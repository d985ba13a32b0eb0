"""Connector-ST: the connector alone trains, in full; the language model stays as it is.

The survey's third place to tune beside the first and the last layers: it adjusts the visual style
and pays where the target's images are far from those of pretraining. The connector trains at the
method's own rate. With `connector: adapted` LoRA adapters of rank `connector_rank` train on its
linears instead; `connector: tuned`, which elsewhere trains it beside a method, says nothing here.
Trainable: all parameters of the connector, or connector_rank (m + n) per matrix.

Small bases: on micro-vlm it learns little (14 points after 10): the connector is told what is seen,
never what is asked, and the frozen language model has to make new words of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.selective import adapt_connector, connector_parameters, parameters_of

from .full_st import initialise  # noqa: F401

declaration = Declaration(
    title="Connector-ST",
    citation="Huang et al., Keeping Yourself is Important in Downstream Tuning Multimodal Large "
    "Language Model, 2025, arXiv:2503.04543",
    family="selective",
    merges=True,
    learning_rate=2e-5,
    learning_rate_source="mm_projector_lr of the same laboratory's scripts (SPIDER, NRCA)",
    applies_to=("vision-language",),
)


@dataclass(frozen=True)
class Hyper:
    connector_rank: int = hyper(
        8,
        "chosen here: rank of LoRA on the connector where it is adapted; else without effect",
        low=1,
    )


def attach(ctx: Context) -> None:
    if ctx.anatomy.connector is None:
        raise SuiteError("connector_st: the base has no connector")
    if ctx.connector == "tuned":
        raise SuiteError(
            "connector: tuned; connector_st trains the connector itself: allowed are frozen (the "
            "default: nothing beside the method) and adapted"
        )
    if ctx.connector == "adapted":
        adapt_connector(ctx, ctx.hyper.connector_rank)
    else:
        ctx.model.get_submodule(ctx.anatomy.connector).requires_grad_(True)


def total_parameters(ctx: Context, size: int | None = None) -> int:
    if ctx.connector == "adapted":
        return connector_parameters(ctx, ctx.hyper.connector_rank)
    return parameters_of(ctx, [ctx.anatomy.connector or ""])
