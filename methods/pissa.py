"""PiSSA: LoRA that starts from the principal part of the weight itself.

    W0 = U S V^T;   A = sqrt(S_r / s) V_r^T,   B = U_r sqrt(S_r / s)   (the r largest)
    y = (W0 - s B_0 A_0) x + s B A x,   s = alpha / r = 1

so the tuned model starts as the base, and what trains is what the weight says loudest. The exact
decomposition is used (the paper also offers a randomised one). B_0 and A_0 are stored with the
adapter, which so reloads on the untouched base; the paper's code saves a changed base instead.
Trainable per matrix: r (m + n).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.lowrank import start_from_weight

from .lora import attach, parameter_count  # noqa: F401

declaration = Declaration(
    title="PiSSA",
    citation="Meng, Wang and Zhang, PiSSA: Principal Singular Values and Singular Vectors "
    "Adaptation of Large Language Models, NeurIPS 2024, arXiv:2404.02948",
    family="reparameterization",
    rank="number of singular triplets that train",
    merges=True,
    learning_rate=2e-5,
    learning_rate_source="the paper's, Table 2 (batch 128, MetaMathQA)",
)


@dataclass(frozen=True)
class Hyper:
    alpha_over_r: float = hyper(1.0, "alpha = r (paper)", low=1e-6)
    dropout: float = hyper(
        0.0, "0 (paper): dropout would drop a part of the weight itself", low=0.0, high=0.0
    )


def initialise(ctx: Context) -> None:
    def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        u, s, vh = ctx.cache.svd(weight)
        root = (s[:rank] / scale).sqrt()
        return root[:, None] * vh[:rank], u[:, :rank] * root

    start_from_weight(ctx, principal)
