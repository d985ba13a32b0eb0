"""DoRA: LoRA turns the weight's direction, a magnitude per output row sets its length.

    V = W0 + s B A;   y = (mag / ||V||) o (V x) + bias,   mag [m] starts at ||W0||

||.|| is the norm of each *output row* of [m, n]: the paper writes column norms of W in R^{d x k};
its code and PEFT take rows, which is implemented here. The norm is treated as a constant in the
backward pass (paper, 4.3). It comes from

    ||V||^2 = ||W0||^2 + 2 s rowsum(B o (W0 A^T)) + s^2 rowsum((B (A A^T)) o B)

so that no [m, n] is formed (PEFT forms B A in every forward), in fp32 whatever the base's precision
and clamped at 0, below which rounding may take a row that B A cancels.

`magnitude_only` names roles (q, k, v, o, gate, up, down) whose modules get a magnitude and no B A,
y = (mag / ||W0||) o (W0 x) + bias: the paper's section 5.6, where q, k and v have DoRA and
"o,gate,up,down" the magnitude alone (`Wdecompose_target_modules` in its code; not in PEFT).

No weight decay on the magnitude: it would pull the model's outputs to zero. With dropout the base's
part sees the whole x; PEFT and the authors' code drop it there too. Trainable per matrix:
r (m + n) + m, of magnitude-only ones m.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ballast.adapters import Adapter, LoraForm, LowRank, adapter_dtype
from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.lowrank import attach_low_rank, target_shapes

from .lora import Hyper as LoRA
from .lora import initialise  # noqa: F401

CHUNK = 2**20  # entries of a base of lower precision raised to fp32 at once

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


@dataclass(frozen=True)
class Hyper(LoRA):
    magnitude_only: str = hyper("", "none (the paper's main tables); section 5.6: o,gate,up,down")

    def __post_init__(self) -> None:
        roles = ("q", "k", "v", "o", "gate", "up", "down")
        for role in self.magnitude_only.split(",") if self.magnitude_only else []:
            if role.strip() not in roles:
                raise ValueError(
                    f"magnitude_only: {role.strip()!r} is no role of a module; allowed: "
                    f"{', '.join(roles)}, with commas between"
                )


class Magnitude(Adapter):
    """y = (mag / ||W0||) o (W0 x) + bias on a Linear, ||.|| per output row."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        dtype = adapter_dtype(base.weight)
        norms = torch.linalg.vector_norm(base.weight, dim=1, dtype=dtype)
        self.register_buffer("norms", norms, persistent=False)
        self.mag = nn.Parameter(norms.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        return _scaled(F.linear(x, self.base.weight), self.mag / self.norms, self.base.bias)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return self.base.weight.to(self.mag.dtype) * (self.mag / self.norms)[:, None]

    @torch.no_grad()
    def as_lora(self) -> LoraForm:
        m, n = self.base.weight.shape
        return LoraForm(self.mag.new_zeros(1, n), self.mag.new_zeros(m, 1), 1.0, self.mag)


def _scaled(y: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """y o gain + bias at y's precision; a rounded gain would shift whole rows of a bf16 output."""
    return (y * gain if bias is None else torch.addcmul(bias, y, gain)).to(y.dtype)


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
        return _scaled(y, gain, self.base.bias).view(*x.shape[:-1], y.shape[-1])

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
        cross = (self.B * self._weight_on_a()).sum(1)
        square = (self.B @ (self.A @ self.A.T) * self.B).sum(1)
        total = self.squares + 2 * self.scale * cross + self.scale**2 * square
        return total.clamp_min_(0).sqrt_()

    def _weight_on_a(self) -> Tensor:
        """W0 A^T [m, r], at A's precision."""
        weight = self._weight()
        if weight.dtype == self.A.dtype:
            return weight @ self.A.T
        parts = weight.split(max(1, CHUNK // weight.shape[1]))
        return torch.cat([part.to(self.A.dtype) @ self.A.T for part in parts])

    def _weight(self) -> Tensor:
        return self.base.weight.T if self.is_embedding else self.base.weight

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        gain = self.mag / self.norm()
        return super().merged_weight() * (gain if self.is_embedding else gain[:, None])

    def as_lora(self) -> LoraForm:
        return replace(super().as_lora(), magnitude=self.mag)


def attach(ctx: Context) -> None:
    light = magnitude_only(ctx)
    others = [name for name in ctx.targets if name not in light]
    attach_low_rank(ctx, ctx.hyper.alpha_over_r, ctx.hyper.dropout, Decomposed, others)
    for name in light:
        ctx.replace(name, Magnitude(ctx.model.get_submodule(name)))


def magnitude_only(ctx: Context) -> set[str]:
    """Targets that get no B A.

    Raises SuiteError for a role that no target has, and if no target is left with a rank.
    """
    asked = {role.strip() for role in ctx.hyper.magnitude_only.split(",")} - {""}
    roles = {name: ctx.anatomy.role(name) for name in ctx.targets}
    for role in sorted(asked - set(roles.values())):
        raise SuiteError(f"magnitude_only: {role}; no module to adapt (`modules`) has that role")
    chosen = {name for name, role in roles.items() if role in asked}
    if chosen and len(chosen) == len(roles):
        raise SuiteError(
            f"magnitude_only: {ctx.hyper.magnitude_only}; every module to adapt is so, and the "
            "rank has no meaning"
        )
    return chosen


def parameter_groups(ctx: Context) -> list[dict[str, Any]]:
    mags = [f"{name}.mag" for name, _ in ctx.adapters()]
    others = [name for name in ctx.own() if name not in set(mags)]
    return [{"params": others}, {"params": mags, "weight_decay": 0.0}]


def parameter_count(m: int, n: int, rank: int) -> int:
    return rank * (m + n) + m


def total_parameters(ctx: Context, rank: int) -> int:
    light = magnitude_only(ctx)
    return sum(
        m if name in light else parameter_count(m, n, rank)
        for name, (m, n) in zip(ctx.targets, target_shapes(ctx), strict=True)
    )
