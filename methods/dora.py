"""DoRA: LoRA turns the weight's direction, a magnitude per output row sets its length.

    V = W0 + s B A;   y = (mag / ||V||) o (V x) + bias,   mag [m] starts at ||W0||

||.|| is the norm of each *output row* of [m, n]: the paper writes column norms of W in R^{d x k};
its code and PEFT take rows, which is implemented here. The norm is treated as a constant in the
backward pass (paper, 4.3). It comes from

    ||V||^2 = ||W0||^2 + 2 s rowsum(B o (W0 A^T)) + s^2 rowsum((B (A A^T)) o B)

so that no [m, n] is formed (PEFT forms B A in every forward).
No weight decay on the magnitude: it would pull the model's outputs to zero. With dropout the base's
part sees the whole x; PEFT and the authors' code drop it there too. Trainable per matrix:
r (m + n) + m.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ballast.adapters import LowRank
from ballast.context import Context
from ballast.declare import Declaration
from ballast.lowrank import attach_low_rank

from .lora import Hyper, initialise  # noqa: F401

declaration = Declaration(
    title="DoRA",
    citation="Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, arXiv:2402.09353",
    family="reparameterization",
    rank="inner dimension r of B A",
    merges=True,
    random_start=True,
    learning_rate=1e-4,
    learning_rate_source="the paper's Table 8, LLaMA-7B r 32 and LLaMA3-8B",
)


class Decomposed(LowRank):
    """mag o V / ||V|| on a Linear; on an Embedding the rows are those of its transpose [d, V]."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank, scale, dropout)
        weight = self._weight()
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=self.A.dtype).square()
        self.register_buffer("squares", squares, persistent=False)
        self.mag = nn.Parameter(squares.sqrt())
        self._kept: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        gain = self.mag / self.norm()
        if self.is_embedding:
            y = self.base(x)
            return ((y + self._low(x)) * gain).to(y.dtype)
        rows = x.flatten(0, -2)
        y = self._add_low(F.linear(rows, self.base.weight), rows)
        bias = self.base.bias
        # A bf16 output is scaled in fp32: a rounded gain would shift whole rows.
        y = (y * gain if bias is None else torch.addcmul(bias, y, gain)).to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])

    def norm(self) -> Tensor:
        """||V|| per output row [m], a constant to autograd.

        Kept from one evaluation forward to the next, until A or B is written or the mode changes:
        versions alone do not tell, a fused optimiser's step leaves them as they are.
        """
        if self.training or torch.is_grad_enabled():
            return self._row_norms()
        versions = self.A._version, self.B._version
        if self._kept is None or self._kept[0] != versions:
            self._kept = versions, self._row_norms()
        return self._kept[1]

    def train(self, mode: bool = True) -> Decomposed:
        self._kept = None
        return super().train(mode)

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        with torch.autocast(self.A.device.type, enabled=False):
            return self._row_norms_exact()

    def _row_norms_exact(self) -> Tensor:
        cross = (self.B * (self._weight().to(self.A.dtype) @ self.A.T)).sum(1)
        square = (self.B @ (self.A @ self.A.T) * self.B).sum(1)
        return (self.squares + 2 * self.scale * cross + self.scale**2 * square).sqrt()

    def _weight(self) -> Tensor:
        return self.base.weight.T if self.is_embedding else self.base.weight

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        gain = self.mag / self.norm()
        return super().merged_weight() * (gain if self.is_embedding else gain[:, None])


def attach(ctx: Context) -> None:
    attach_low_rank(ctx, scale=ctx.hyper.alpha_over_r, dropout=ctx.hyper.dropout, layer=Decomposed)


def parameter_groups(ctx: Context) -> list[dict[str, Any]]:
    mags = [f"{name}.mag" for name, _ in ctx.adapters()]
    others = [name for name in ctx.own() if name not in set(mags)]
    return [{"params": others}, {"params": mags, "weight_decay": 0.0}]


def parameter_count(m: int, n: int, rank: int) -> int:
    return rank * (m + n) + m
