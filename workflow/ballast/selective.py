"""Selective tuning: the decoder layers that train in full, everything else frozen.

Embeddings, final norm and head stay frozen; the norms inside a chosen layer train with it. A
connector may train low-rank adapters beside the layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from ballast.context import Context
from ballast.errors import SuiteError
from ballast.lowrank import attach_low_rank, start_kaiming, target_shapes

CONNECTOR_SCALE = 2.0  # s of LoRA's default, alpha = 2r


def layer_count(layers: float, total: int) -> int:
    """How many of `total` decoder layers `layers` means.

    Below 1 it is a fraction (rounded to the nearest whole number, at least 1 layer), from 1 on a
    number of layers. Raises SuiteError for 0, for 2.5 and for more layers than there are.

    >>> layer_count(0.25, 28), layer_count(0.25, 3), layer_count(2, 28)
    (7, 1, 2)
    """
    if 0 < layers < 1:
        return max(1, int(layers * total + 0.5))
    if layers != int(layers) or not 1 <= layers <= total:
        raise SuiteError(
            f"layers: {layers!r}; a fraction between 0 and 1, or a number of layers "
            f"from 1 to {total}, is needed"
        )
    return int(layers)


def tune_layers(ctx: Context, names: Sequence[str], connector_rank: int | None = None) -> None:
    """Let every parameter of these decoder layers train.

    connector_rank: rank of the LoRA adapters that train on the connector's linears where the
    connector is to be adapted; None for methods that have none.
    Raises SuiteError where the connector is to be adapted and cannot be.
    """
    if ctx.connector == "adapted":
        adapt_connector(ctx, connector_rank)
    for name in names:
        ctx.model.get_submodule(name).requires_grad_(True)


def adapt_connector(ctx: Context, rank: int | None) -> None:
    """LoRA on the connector's linears. Raises SuiteError without a rank that they allow."""
    if rank is None:
        raise SuiteError("connector: adapted; allowed for this method: frozen, tuned")
    attach_low_rank(dataclasses.replace(_only_connector(ctx), rank=rank), CONNECTOR_SCALE)


def start_connector(ctx: Context) -> None:
    """Start the connector's adapters, where there are some, as LoRA does."""
    start_kaiming(ctx)


def connector_parameters(ctx: Context, rank: int) -> int:
    """How many parameters `adapt_connector` trains; 0 where the connector is not adapted."""
    if ctx.connector != "adapted":
        return 0
    return sum(rank * (m + n) for m, n in target_shapes(_only_connector(ctx)))


def _only_connector(ctx: Context) -> Context:
    inside = tuple(name for name in ctx.targets if ctx.in_connector(name))
    return dataclasses.replace(ctx, targets=inside)


def parameters_of(ctx: Context, names: Sequence[str]) -> int:
    """How many parameters these modules hold."""
    return sum(p.numel() for n in names for p in ctx.model.get_submodule(n).parameters())


def tune_all(ctx: Context, connector_rank: int | None = None) -> None:
    """Full-ST: every decoder layer."""
    tune_layers(ctx, ctx.anatomy.layer_names(ctx.model), connector_rank)


def copies(ctx: Context) -> dict[str, Tensor]:
    """Copies of the parameters that train now, by name: theta0 when taken in `attach`."""
    return {name: p.detach().clone() for name, p in ctx.own().items()}
