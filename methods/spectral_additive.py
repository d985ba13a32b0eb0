"""Spectral Adapter, additive: the top singular vectors of the weight are corrected.

    W0 = U S V^T;   W' = [U1 + A_U, U2] S [V1 + A_V, V2]^T       (U1, V1: the r top columns)
       = W0 + (U1 + A_U) S1 (V1 + A_V)^T - U1 S1 V1^T,   A_U [m, r] and A_V [n, r] at zero

The change has rank up to 2r, twice LoRA's at the same count. In fp32 and float64 U1 S1 V1^T is
subtracted from the base once, so that a step costs LoRA's; a half-precision base, which would
round the rest, stays as it is and the change is written with 2r columns,

    A_U (S1 (V1 + A_V)^T) + U1 (S1 A_V^T).

The released code keeps U, S, V in bf16 in place of the base. U1, S1 and V1 are stored with the
adapter, which so reloads without another decomposition. The update is A times singular values, so
that the learning rate is about a tenth of LoRA's. Trainable per matrix: r (m + n).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ballast.adapters import Adapter, adapter_dtype
from ballast.context import Context
from ballast.declare import Declaration
from ballast.structured import attach_linears

declaration = Declaration(
    title="Spectral Adapter (additive)",
    citation="Zhang and Pilanci, Spectral Adapter: Fine-Tuning in Spectral Space, NeurIPS 2024, "
    "arXiv:2405.13952",
    family="reparameterization",
    rank="number r of top singular columns that are tuned",
    merges=True,
    learning_rate=2.5e-5,
    learning_rate_source="the paper's, for Mistral-7B on GSM8K (r 8)",
)


class Spectral(Adapter):
    """W0 plus a low-rank change that is made of its r top singular triplets U1, S1, V1.

    A subclass says by `factors` what is added to the base: left core right^T, of left [m, k], core
    [k, k] (None for none) and right [n, k].
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__(base)
        self.rank = rank
        self.kind = {"dtype": adapter_dtype(base.weight), "device": base.weight.device}
        for name in ("U1", "S1", "V1"):
            self.register_buffer(name, None)

    @torch.no_grad()
    def start(self, u: Tensor, s: Tensor, vh: Tensor) -> None:
        """Take the top of the base weight's decomposition."""
        self.U1 = u[:, : self.rank].to(**self.kind).contiguous()
        self.S1 = s[: self.rank].to(**self.kind).contiguous()
        self.V1 = vh[: self.rank].T.to(**self.kind).contiguous()
        self.restored()

    def factors(self) -> tuple[Tensor, Tensor | None, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        rows = x.flatten(0, -2)
        y = self.base(rows)
        with torch.autocast(x.device.type, enabled=False):
            left, core, right = self.factors()
        low = rows.to(right.dtype) @ right
        low = low if core is None else low @ core.T
        if y.dtype == left.dtype:
            y.addmm_(low, left.T)
        else:
            y = y + (low @ left.T).to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        left, core, right = self.factors()
        left = left if core is None else left @ core
        return self.base.weight.to(left.dtype) + left @ right.T


class Additive(Spectral):
    """(U1 + A_U) S1 (V1 + A_V)^T in place of U1 S1 V1^T."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__(base, rank)
        m, n = base.weight.shape
        self.A_U = nn.Parameter(torch.zeros(m, rank, **self.kind))
        self.A_V = nn.Parameter(torch.zeros(n, rank, **self.kind))
        self.subtracts = base.weight.dtype == self.A_U.dtype

    @torch.no_grad()
    def restored(self) -> None:
        if self.subtracts:
            weight = self.base.weight
            weight.data = weight.data - (self.U1 * self.S1) @ self.V1.T

    def factors(self) -> tuple[Tensor, None, Tensor]:
        v = (self.V1 + self.A_V) * self.S1
        if self.subtracts:
            return self.U1 + self.A_U, None, v
        left = torch.cat([self.A_U, self.U1], dim=1)
        return left, None, torch.cat([v, self.A_V * self.S1], dim=1)


def attach(ctx: Context) -> None:
    attach_linears(ctx, lambda base: Additive(base, ctx.rank))


def initialise(ctx: Context) -> None:
    for _, layer in ctx.adapters():
        layer.start(*ctx.cache.svd(layer.base.weight))


def parameter_count(m: int, n: int, rank: int) -> int:
    return rank * (m + n)
