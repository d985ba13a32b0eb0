"""Spectral Adapter, rotational: the top singular vectors of the weight are turned.

    W' = [U1 R_U, U2] S [V1 R_V, V2]^T = W0 + U1 (R_U S1 R_V^T - S1) V1^T
    R = (I - K) (I + K)^-1,   K = (X - X^T) / 2,   X_U and X_V [r, r] at zero

R is orthogonal (Cayley), so that the columns stay orthonormal and W' keeps W0's singular values.
`scale` adds the released code's factor on each of them, S1 o gain with gain [r] at one. One column
has nothing to turn in: r = 1 is refused, unless its singular value is scaled.

The change passes through an [r, r] matrix between frozen factors: x is not kept for the backward
pass. No decay on gain, which would pull the singular values to zero. Trainable per matrix: 2 r^2
(r (r - 1) of them free), and r more with scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.structured import attach_linears

from .spectral_additive import Spectral, initialise  # noqa: F401

declaration = Declaration(
    title="Spectral Adapter (rotational)",
    citation="Zhang and Pilanci, Spectral Adapter: Fine-Tuning in Spectral Space, NeurIPS 2024, "
    "arXiv:2405.13952",
    family="reparameterization",
    rank="number r of top singular columns that are turned",
    merges=True,
    learning_rate=1e-4,
    learning_rate_source="the released configuration for a U-Net; the paper rotates nothing else",
)


@dataclass(frozen=True)
class Hyper:
    scale: bool = hyper(False, "rotation alone (paper); the released code also trains gains")


class Rotational(Spectral):
    """U1 (R_U S1 R_V^T - S1) V1^T added to the base."""

    def __init__(self, base: nn.Linear, rank: int, scale: bool) -> None:
        super().__init__(base, rank)
        self.X_U = nn.Parameter(torch.zeros(rank, rank, **self.kind))
        self.X_V = nn.Parameter(torch.zeros(rank, rank, **self.kind))
        self.gain = nn.Parameter(torch.ones(rank, **self.kind)) if scale else None

    def core(self) -> Tensor:
        """R_U S1 R_V^T - S1 [r, r]."""
        turn_u, turn_v = cayley(torch.stack([self.X_U, self.X_V]))
        values = self.S1 if self.gain is None else self.S1 * self.gain
        return (turn_u * values) @ turn_v.T - self.S1.diag()

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.U1, self.core(), self.V1


def cayley(x: Tensor) -> Tensor:
    """Orthogonal matrices (I - K)(I + K)^-1 from any square ones, K their antisymmetric part."""
    k = (x - x.mT) / 2
    one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.linalg.solve(one + k, one - k)  # the two factors commute


def attach(ctx: Context) -> None:
    if ctx.rank == 1 and not ctx.hyper.scale:
        raise SuiteError("rank 1: one column has nothing to turn in; use 2 or more, or scale: true")
    attach_linears(ctx, lambda base: Rotational(base, ctx.rank, ctx.hyper.scale))


def allowed_sizes(ctx: Context) -> range:
    limit = min(min(ctx.model.get_submodule(name).weight.shape) for name in ctx.targets)
    return range(1 if ctx.hyper.scale else 2, limit + 1)


def parameter_groups(ctx: Context) -> list[dict[str, Any]]:
    gains = [name for name in ctx.own() if name.endswith(".gain")]
    others = [name for name in ctx.own() if name not in gains]
    groups = [{"params": others}, {"params": gains, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def total_parameters(ctx: Context, rank: int) -> int:
    return len(ctx.targets) * (2 * rank**2 + (rank if ctx.hyper.scale else 0))
