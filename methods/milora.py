"""MiLoRA: PiSSA with the r *smallest* singular triplets: the loud part of the weight stays.

    A = sqrt(S_m / s) V_m^T,   B = U_m sqrt(S_m / s)   (the r smallest of min(m, n)),   s = 1

The paper's scripts use dropout 0.05; here it is 0 as in PiSSA, so that the two differ by their
triplets alone. The subtraction is done in fp32: the minor components lie near bf16's rounding.
"""

from __future__ import annotations

from torch import Tensor

from ballast.context import Context
from ballast.declare import Declaration
from ballast.lowrank import start_from_weight

from .lora import attach, parameter_count  # noqa: F401
from .pissa import Hyper  # noqa: F401

declaration = Declaration(
    title="MiLoRA",
    citation="Wang et al., MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient "
    "LLM Finetuning, NAACL 2025, arXiv:2406.09044",
    family="reparameterization",
    rank="number of singular triplets that train",
    merges=True,
    learning_rate=3e-4,
    learning_rate_source="the paper's (commonsense and mathematics)",
)


def initialise(ctx: Context) -> None:
    def minor(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        u, s, vh = ctx.cache.svd(weight)
        root = (s[-rank:] / scale).sqrt()
        return root[:, None] * vh[-rank:], u[:, -rank:] * root

    start_from_weight(ctx, minor)
