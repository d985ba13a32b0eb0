"""LoRA-FA: LoRA with its random factor frozen.

    y = W0 x + s B A x,   A [r, n] random and frozen, B [m, r] trained from zero,   s = alpha / r

With A frozen no gradient needs the layer's input x [tokens, n], only A x [tokens, r]: activation
memory falls, and one of the four products of LoRA's backward pass is saved. As in loralib an
embedding's random factor is B, so there B is frozen and A trains. The start is LoRA's; the paper
says Gaussian, PEFT draws the kaiming uniform as well.

PEFT's optimiser is not this method but its second version: it projects the gradient so that the
step of B A is the one nearest to full tuning's, g_B <- g_B (A A^T)^-1 / s^2. That is `projected`,
done before clipping here (PEFT's runs inside the optimiser, after clipping); PEFT adds 1e-8 to the
diagonal of A A^T and multiplies in bf16 where the machine has it, which is not done here. Trainable
per matrix: r m.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ballast.adapters import LowRank
from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.lowrank import attach_low_rank

from .lora import initialise  # noqa: F401

declaration = Declaration(
    title="LoRA-FA",
    citation="Zhang et al., LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language "
    "Models Fine-tuning, 2023, arXiv:2308.03303",
    family="reparameterization",
    rank="inner dimension r of B A",
    merges=True,
    random_start=True,
    learning_rate=2e-4,
    learning_rate_source="that of LoRA, as in PEFT's comparison of methods",
)


@dataclass(frozen=True)
class Hyper:
    alpha_over_r: float = hyper(2.0, "alpha = 2r, as for LoRA", low=1e-6)
    dropout: float = hyper(0.0, "that of LoRA here", low=0.0, high=0.99)
    projected: bool = hyper(False, "the paper's first version; True: PEFT's optimiser")


class Frozen(LowRank):
    """LowRank whose random factor is stored but does not train."""

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, rank, scale, dropout)
        name = "B" if self.is_embedding else "A"
        start = getattr(self, name).detach()
        delattr(self, name)
        self.register_buffer(name, start)

    def gram(self) -> Tensor:
        """A A^T of the frozen factor, or B^T B [r, r]."""
        return self.B.T @ self.B if self.is_embedding else self.A @ self.A.T


def attach(ctx: Context) -> None:
    attach_low_rank(ctx, scale=ctx.hyper.alpha_over_r, dropout=ctx.hyper.dropout, layer=Frozen)


@torch.no_grad()
def after_backward(ctx: Context) -> None:
    if not ctx.hyper.projected:
        return
    inverses = ctx.scratch.setdefault("inverses", {})
    for name, layer in ctx.adapters():
        if name not in inverses:
            inverses[name] = torch.linalg.inv(layer.gram()) / layer.scale**2
        if layer.is_embedding:
            layer.A.grad = inverses[name] @ layer.A.grad
        else:
            layer.B.grad = layer.B.grad @ inverses[name]


def parameter_count(m: int, n: int, rank: int) -> int:
    return rank * m
