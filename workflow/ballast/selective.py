"""Selective tuning: the decoder layers that train in full, everything else frozen.

Embeddings, final norm and head stay frozen; the norms inside a chosen layer train with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ballast.context import Context
from ballast.errors import SuiteError


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


def tune_layers(ctx: Context, names: Sequence[str]) -> None:
    """Let every parameter of these decoder layers train.

    Raises SuiteError where the connector is to be adapted: there is no low-rank update here.
    """
    if ctx.connector == "adapted":
        raise SuiteError("connector: adapted needs a method with a rank; use tuned or frozen here")
    for name in names:
        ctx.model.get_submodule(name).requires_grad_(True)


def tune_all(ctx: Context) -> None:
    """Full-ST: every decoder layer."""
    tune_layers(ctx, ctx.anatomy.layer_names(ctx.model))


def copies(ctx: Context) -> dict[str, Tensor]:
    """Copies of the parameters that train now, by name: theta0 when taken in `attach`."""
    return {name: p.detach().clone() for name, p in ctx.own().items()}
