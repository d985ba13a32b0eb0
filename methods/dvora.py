"""DVoRA: DoRA whose direction is turned by VeRA in place of LoRA.

    V = W0 + diag(b) B diag(d) A;   y = (mag / ||V||) o (V x) + bias,   mag [m] starts at ||W0||

A and B are VeRA's frozen pair for all layers, ||.|| is DoRA's: per output row, a constant in the
backward pass. As A, B and W0 never change, what the norm needs of them is made once,

    ||V||^2 = ||W0||^2 + 2 b o (C d) + b^2 o rowsum((S G) o S),   S = B diag(d)
    C = B o (W0 A^T) [m, r],   G = A A^T [r, r]

and each forward costs m r^2 instead of the m n r of forming V; C costs m r numbers of memory per
matrix. From r = n on that is no longer less, and V is formed. There is no code by the authors and
none in PEFT; the DoRA paper's section 5 gives r 1,024 and the rate. mag and d are not decayed.
Trainable per matrix: 2 m + r.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ballast.adapters import LoraForm
from ballast.context import Context
from ballast.declare import Declaration

from .dora import _scaled
from .vera import Hyper, Vera, allowed_sizes, attach_vera, initialise, restored  # noqa: F401

declaration = Declaration(
    title="DVoRA",
    citation="Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, "
    "arXiv:2402.09353, section 5, with VeRA, arXiv:2310.11454",
    family="reparameterization",
    rank="number r of random directions that all layers share",
    merges=True,
    random_start=True,
    learning_rate=4e-3,
    learning_rate_source="the DoRA paper's, for VeRA and DVoRA on LLaMA (r 1,024)",
)


class DecomposedVera(Vera):
    """mag o V / ||V|| with VeRA's V."""

    def __init__(self, base: nn.Linear, rank: int, dropout: float = 0.0) -> None:
        super().__init__(base, rank, dropout)
        squares = torch.linalg.vector_norm(base.weight, dim=1, dtype=self.d.dtype).square()
        self.register_buffer("squares", squares, persistent=False)
        self.register_buffer("C", None, persistent=False)
        self.register_buffer("gram", None, persistent=False)
        self.mag = nn.Parameter(squares.sqrt())
        self._kept: tuple[tuple[int, int], Tensor] | None = None

    @torch.no_grad()
    def share(self, a: Tensor, b: Tensor) -> None:
        """Take the slices of the shared pair, and what the norm needs of them."""
        super().share(a, b)
        if self.rank < self.base.weight.shape[1]:
            self.C = self.B * (self.base.weight.to(self.d.dtype) @ self.A.T)
            self.gram = self.A @ self.A.T

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        rows = x.flatten(0, -2)
        way = self.way(rows)
        if way == "low":
            y = self._add_low(F.linear(rows, self.base.weight), rows)
        else:
            y = self._formed(rows, way)
        y = _scaled(y, self.mag / self.norm(), self.base.bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    def norm(self) -> Tensor:
        """||V|| per output row [m], a constant to autograd.

        Kept between evaluation forwards as DoRA's is: until b or d is written or the mode changes.
        """
        if self.training or torch.is_grad_enabled():
            return self._row_norms()
        versions = self.b._version, self.d._version
        if self._kept is None or self._kept[0] != versions:
            self._kept = versions, self._row_norms()
        return self._kept[1]

    def train(self, mode: bool = True) -> DecomposedVera:
        self._kept = None
        return super().train(mode)

    @torch.no_grad()
    def _row_norms(self) -> Tensor:
        with torch.autocast(self.d.device.type, enabled=False):
            if self.C is None:
                return torch.linalg.vector_norm(super().merged_weight(), dim=1)
            turned = self.B * self.d
            square = (turned @ self.gram * turned).sum(1)
            total = self.squares + 2 * self.b * (self.C @ self.d) + self.b.square() * square
            return total.clamp_min_(0).sqrt_()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return super().merged_weight() * (self.mag / self.norm())[:, None]

    def as_lora(self) -> LoraForm:
        return replace(super().as_lora(), magnitude=self.mag)


def attach(ctx: Context) -> None:
    attach_vera(ctx, DecomposedVera)


def parameter_groups(ctx: Context) -> list[dict[str, Any]]:
    kept = {f"{name}.{short}" for name, _ in ctx.adapters() for short in ("d", "mag")}
    own = list(ctx.own())
    return [
        {"params": [name for name in own if name not in kept]},
        {"params": [name for name in own if name in kept], "weight_decay": 0.0},
    ]


def parameter_count(m: int, n: int, rank: int) -> int:
    return 2 * m + rank
