"""Adapters on linears alone, and dense updates made of few numbers.

A dense update costs one matrix product more per step than the frozen base (its gradient passes
through that of the whole weight), as much as tuning in full; everything else here is kept small
beside that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ballast.adapters import Adapter, adapter_dtype
from ballast.context import Context
from ballast.errors import SuiteError


def attach_linears(ctx: Context, make: Callable[[nn.Linear], Adapter]) -> None:
    """Replace every target by make(target).

    Raises SuiteError if there is none, if one is not a Linear, or if the cell's rank exceeds a
    target's smaller side.
    """
    if not ctx.targets:
        raise SuiteError("modules: nothing to adapt")
    for name in ctx.targets:
        base = ctx.model.get_submodule(name)
        if not isinstance(base, nn.Linear):
            kind = "an embedding" if isinstance(base, nn.Embedding) else type(base).__name__
            raise SuiteError(f"modules: {name} is {kind}; this method adapts linear modules only")
        m, n = base.weight.shape
        if ctx.rank is not None and ctx.rank > min(m, n):
            raise SuiteError(
                f"rank {ctx.rank} is larger than {name} [{m}, {n}] allows: at most {min(m, n)}"
            )
        ctx.replace(name, make(base))


class DenseUpdate(Adapter):
    """y = x (W0 + dW)^T + bias, where dW [m, n] is linear in one parameter theta.

    A subclass sets `theta` and says what dW is (`spread`) and the adjoint of that (`gather`), by
    which theta's gradient follows from the weight's. dW is formed once per forward; while
    evaluating without gradients it is kept until theta is written or the mode changes.

    On a half-precision base dW is multiplied by itself: in a rounded sum W0 + dW every change
    smaller than W0's own rounding would be lost.
    """

    theta: nn.Parameter

    def __init__(self, base: nn.Linear, *shape: int) -> None:
        super().__init__(base)
        weight = base.weight
        kind = {"dtype": adapter_dtype(weight), "device": weight.device}
        self.theta = nn.Parameter(torch.zeros(*shape, **kind))
        self._kept: tuple[tuple[int, torch.dtype], tuple[Tensor, ...]] | None = None

    def spread(self, theta: Tensor) -> Tensor:
        """dW [m, n] at theta's precision, a fresh tensor."""
        raise NotImplementedError

    def gather(self, grad: Tensor) -> Tensor:
        """The adjoint of `spread`: theta's gradient from the weight's [m, n]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        rows = x.flatten(0, -2)
        with torch.autocast(kind, enabled=False):
            if torch.is_grad_enabled():
                y = _Dense.apply(rows, self.theta, self)
            else:
                y = self._linear(rows, self._evaluated(x.dtype))
        return y.view(*x.shape[:-1], y.shape[-1])

    def train(self, mode: bool = True) -> DenseUpdate:
        self._kept = None
        return super().train(mode)

    def matrices(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What inputs of this precision are multiplied by: W0 + dW, or the two apart."""
        update, weight = self.spread(self.theta), self.base.weight
        if weight.dtype == update.dtype:
            return (update.add_(weight).to(dtype),)
        return weight.to(dtype), update.to(dtype)

    def _evaluated(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if self.training:
            return self.matrices(dtype)
        key = self.theta._version, dtype
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self.matrices(dtype)
        return self._kept[1]

    def _linear(self, rows: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
        bias = self.base.bias
        y = F.linear(rows, matrices[0], None if bias is None else bias.to(rows.dtype))
        for matrix in matrices[1:]:
            y.addmm_(rows, matrix.T)
        return y

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return self.spread(self.theta).add_(self.base.weight)


class _Dense(torch.autograd.Function):
    """One product with the dense weight, whose gradient is handed to `gather` and not kept."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, theta: Tensor, layer: DenseUpdate) -> Tensor:
        matrices = layer.matrices(rows.dtype)
        ctx.layer = layer
        ctx.save_for_backward(rows, theta, *matrices)
        return layer._linear(rows, matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, theta, *matrices = ctx.saved_tensors
        to_rows = to_theta = None
        if ctx.needs_input_grad[0]:
            to_rows = grad @ matrices[0]
            for matrix in matrices[1:]:
                to_rows.addmm_(grad, matrix)
        if ctx.needs_input_grad[1]:
            to_theta = ctx.layer.gather((grad.T @ rows).to(theta.dtype))
        return to_rows, to_theta, None
