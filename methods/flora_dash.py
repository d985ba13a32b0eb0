"""FLoRA-Dash: FLoRA, and after a first phase its strongest directions of the weight by themselves.

    W = W0 + s B G A + sum_{i in I} dsigma_i u_i v_i^T

LoRA-Dash's directions (`_dash.py`), chosen by the change that B G A has made, beside FLoRA's core
(`flora.py`). Trainable per matrix: r (m + n) + r^2 + directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ballast.context import Context
from ballast.declare import Declaration
from ballast.lowrank import attach_low_rank, target_shapes

from . import flora
from ._dash import Dash, after_step, report  # noqa: F401
from ._dash import Hyper as Dashing
from .flora import Core, initialise  # noqa: F401
from .flora import Hyper as FLoRA

declaration = Declaration(
    title="FLoRA-Dash",
    citation="Si et al., Unleashing the Power of Task-Specific Directions in Parameter Efficient "
    "Fine-tuning, ICLR 2025, arXiv:2409.01035; on Si et al., FLoRA, arXiv:2405.14739",
    family="reparameterization",
    rank="side r of the core G",
    merges=True,
    random_start=True,
    alternates=True,
    learning_rate=2e-4,
    learning_rate_source="LoRA-Dash's for LLaMA-7B",
)


@dataclass(frozen=True)
class Hyper(Dashing, FLoRA):
    pass


class DashCore(Dash, Core):
    """FLoRA's layer with LoRA-Dash's directions."""


def attach(ctx: Context) -> None:
    layer = partial(DashCore, directions=ctx.hyper.directions)
    attach_low_rank(ctx, ctx.hyper.alpha_over_r, ctx.hyper.dropout, layer)


def total_parameters(ctx: Context, rank: int) -> int:
    shapes = target_shapes(ctx)
    own = sum(flora.parameter_count(m, n, rank) for m, n in shapes)
    return own + ctx.hyper.directions * len(shapes)
