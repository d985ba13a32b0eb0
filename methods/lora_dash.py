"""LoRA-Dash: LoRA, and after a first phase its strongest directions of the weight by themselves.

    W = W0 + s B A + sum_{i in I} dsigma_i u_i v_i^T,   s = alpha / r

The directions u_i, v_i are singular vectors of W0, chosen where B A has changed W0 most relative to
sigma_i; `_dash.py` has the mathematics and what differs from the authors' code. Before the launch
it is LoRA. Trainable per matrix: r (m + n) + directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ballast.context import Context
from ballast.declare import Declaration
from ballast.lowrank import attach_low_rank, target_shapes

from . import lora
from ._dash import Dash, after_step, report  # noqa: F401
from ._dash import Hyper as Dashing
from .lora import Hyper as LoRA
from .lora import initialise  # noqa: F401

declaration = Declaration(
    title="LoRA-Dash",
    citation="Si et al., Unleashing the Power of Task-Specific Directions in Parameter Efficient "
    "Fine-tuning, ICLR 2025, arXiv:2409.01035",
    family="reparameterization",
    rank="inner dimension r of B A",
    merges=True,
    random_start=True,
    alternates=True,
    learning_rate=2e-4,
    learning_rate_source="the paper's for LLaMA-7B (LLaMA3-8B: 1e-4)",
)


@dataclass(frozen=True)
class Hyper(Dashing, LoRA):
    pass


def attach(ctx: Context) -> None:
    layer = partial(Dash, directions=ctx.hyper.directions)
    attach_low_rank(ctx, ctx.hyper.alpha_over_r, ctx.hyper.dropout, layer)


def total_parameters(ctx: Context, rank: int) -> int:
    shapes = target_shapes(ctx)
    own = sum(lora.parameter_count(m, n, rank) for m, n in shapes)
    return own + ctx.hyper.directions * len(shapes)
