"""AdaLoRA-Dash: AdaLoRA, and after a first phase its strongest directions of the weight.

    W = W0 + s P diag(lambda) Q + sum_{i in I} dsigma_i u_i v_i^T

LoRA-Dash's directions (`_dash.py`), chosen by the change that P diag(lambda) Q has made, beside
AdaLoRA's triplets (`adalora.py`); the budget, the importance and the orthogonality are of the
triplets alone. The paper applies Dash to AdaLoRA without saying when it launches; here it is after
`launch` optimiser steps as on LoRA, an allocation of the same step first. Trainable per matrix:
r0 (m + n + 1) + directions.
"""

from __future__ import annotations

from dataclasses import dataclass

from ballast.context import Context
from ballast.declare import Declaration

from . import _dash, adalora
from ._dash import Dash
from ._dash import Hyper as Dashing
from .adalora import Hyper as Budgeted
from .adalora import Triplets, attach_triplets, initialise, penalty, restored  # noqa: F401

declaration = Declaration(
    title="AdaLoRA-Dash",
    citation="Si et al., Unleashing the Power of Task-Specific Directions in Parameter Efficient "
    "Fine-tuning, ICLR 2025, arXiv:2409.01035; on Zhang et al., AdaLoRA, arXiv:2303.10512",
    family="reparameterization",
    rank="average rank of the matrices after the last allocation; training starts with 1.5 x",
    merges=True,
    random_start=True,
    alternates=True,
    learning_rate=5e-4,
    learning_rate_source="AdaLoRA's",
)


@dataclass(frozen=True)
class Hyper(Dashing, Budgeted):
    pass


class DashTriplets(Dash, Triplets):
    """AdaLoRA's layer with LoRA-Dash's directions."""


def attach(ctx: Context) -> None:
    attach_triplets(ctx, DashTriplets, directions=ctx.hyper.directions)


def after_step(ctx: Context) -> None:
    adalora.after_step(ctx)
    _dash.after_step(ctx)


def report(ctx: Context) -> dict[str, float]:
    return adalora.report(ctx) | _dash.report(ctx)


def total_parameters(ctx: Context, rank: int) -> int:
    return adalora.total_parameters(ctx, rank) + ctx.hyper.directions * len(ctx.targets)
