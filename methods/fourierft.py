"""FourierFT: the update is a picture with few frequencies.

    dW = scaling Re(ifft2(F)),   F [m, n] zero but for n_frequency entries,   F[p_i, q_i] = c_i
    dW[a, b] = scaling / (m n) sum_i c_i cos(2 pi (p_i a / m + q_i b / n))

The positions are drawn once per shape of matrix, without replacement, shared by all matrices of
that shape and stored with the cell; the coefficients c train. The paper draws c from N(0, 1), so
that the tuned model does not start as the base; with `coefficients: zeros` it does (PEFT's
init_weights). `scaling` multiplies the inverse transform with its 1 / (m n), as in the released
code and PEFT.

Only the real part is needed: F's Hermitian part is transformed by one complex and one real pass,
and the gradient of c_i is the real part of the weight gradient's transform at (p_i, q_i).
Trainable per matrix: n_frequency.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.structured import DenseUpdate, attach_linears

declaration = Declaration(
    title="FourierFT",
    citation="Gao et al., Parameter-Efficient Fine-Tuning with Discrete Fourier Transform, "
    "ICML 2024, arXiv:2405.03003",
    family="reparameterization",
    size="n_frequency",
    merges=True,
    unchanged_at_start=False,
    random_start=True,
    learning_rate=3e-2,
    learning_rate_source="the paper's, for LLaMA on Alpaca",
)


@dataclass(frozen=True)
class Hyper:
    n_frequency: int = hyper(1000, "the paper's for LLaMA, PEFT's default", low=1)
    scaling: float = hyper(150.0, "PEFT's default; the paper has 300 for LLaMA", low=0.0)
    coefficients: str = hyper("normal", "N(0, 1) (paper)", choices=("normal", "zeros"))


class Frequencies(DenseUpdate):
    """dW from coefficients theta [n_frequency] at `entries`, flat positions in [m, n].

    With real c, Re(ifft2(F)) = ifft2 of (F[p, q] + F[-p, -q]) / 2, of which the columns q <= n / 2
    say everything: c_i / 2 lies there at (p_i, q_i), at its mirror, or at both.
    """

    def __init__(self, base: nn.Linear, count: int, scaling: float) -> None:
        super().__init__(base, count)
        m, n = base.weight.shape
        self.factor = scaling / (m * n)
        for name in ("slots", "sources", "lookups"):
            self.register_buffer(name, None, persistent=False)

    def place(self, entries: Tensor) -> None:
        """Say where the coefficients stand. Without this the layer cannot be used."""
        m, n = self.base.weight.shape
        entries = entries.to(self.theta.device)
        columns = n // 2 + 1
        p, q = entries // n, entries % n
        mirrored_p, mirrored_q = -p % m, -q % n
        here, there = q < columns, mirrored_q < columns
        direct, mirror = p * columns + q, mirrored_p * columns + mirrored_q
        index = torch.arange(len(entries), device=entries.device)
        # Twice: real and imaginary parts lie side by side, and coefficients are real.
        self.slots = 2 * torch.cat([direct[here], mirror[there]])
        self.sources = torch.cat([index[here], index[there]])
        self.lookups = torch.where(here, direct, mirror)

    def spread(self, theta: Tensor) -> Tensor:
        m, n = self.base.weight.shape
        columns = n // 2 + 1
        half = theta.new_zeros(m * columns * 2)
        half.index_add_(0, self.slots, theta.index_select(0, self.sources), alpha=0.5 * self.factor)
        spectrum = torch.view_as_complex(half.view(m, columns, 2))
        # Two passes, not irfft2, which copies its input and takes two to four times as long.
        return torch.fft.irfft(
            torch.fft.ifft(spectrum, dim=0, norm="forward"), n=n, dim=1, norm="forward"
        )

    def gather(self, grad: Tensor) -> Tensor:
        spectrum = torch.view_as_real(torch.fft.rfft2(grad))[..., 0]
        return self.factor * spectrum.flatten()[self.lookups]


def attach(ctx: Context) -> None:
    count = ctx.hyper.n_frequency
    for name in ctx.targets:
        m, n = ctx.model.get_submodule(name).weight.shape
        if count > m * n:
            raise SuiteError(
                f"n_frequency {count} is more than {name} [{m}, {n}] has entries: at most {m * n}"
            )
    attach_linears(ctx, lambda base: Frequencies(base, count, ctx.hyper.scaling))


@torch.no_grad()
def initialise(ctx: Context) -> None:
    for _, layer in ctx.adapters():
        if (key := _key(layer)) not in ctx.state:
            order = torch.randperm(layer.base.weight.numel(), generator=ctx.generator)
            ctx.state[key] = order[: ctx.hyper.n_frequency].clone()
    restored(ctx)
    if ctx.hyper.coefficients == "normal":
        for _, layer in ctx.adapters():
            layer.theta.copy_(torch.randn(layer.theta.shape, generator=ctx.generator))


def restored(ctx: Context) -> None:
    for _, layer in ctx.adapters():
        layer.place(ctx.state[_key(layer)])


def parameter_count(m: int, n: int, size: int) -> int:
    return size


def _key(layer: Frequencies) -> str:
    m, n = layer.base.weight.shape
    return f"entries.{m}x{n}"
