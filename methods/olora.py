"""OLoRA: PiSSA's idea with a QR decomposition, cheaper than an SVD.

    W0 = Q R;   B = Q[:, :r],   A = R[:r, :];   y = (W0 - s B_0 A_0) x + s B A x,   s = 1

The first r columns of Q depend on the first r columns of W0 alone, so only those are decomposed,
and R[:r, :] = Q_r^T W0. The paper keeps alpha fixed over the ranks; s = 1 is used here (alpha = r).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ballast.context import Context
from ballast.declare import Declaration
from ballast.lowrank import start_from_weight

from .lora import attach, parameter_count  # noqa: F401
from .pissa import Hyper  # noqa: F401

declaration = Declaration(
    title="OLoRA",
    citation="Büyükakyüz, OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models, 2024, "
    "arXiv:2406.01775",
    family="reparameterization",
    rank="number of orthonormal columns that train",
    merges=True,
    learning_rate=2e-4,
    learning_rate_source="that of LoRA; the paper's own was not available",
)


def initialise(ctx: Context) -> None:
    start_from_weight(ctx, orthonormal)


def orthonormal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """R[:r] and Q[:, :r]; the scale multiplies the product that starts (and is subtracted)."""
    matrix = weight if weight.dtype == torch.float64 else weight.float()
    q = torch.linalg.qr(matrix[:, :rank]).Q
    return q.T @ matrix, q
