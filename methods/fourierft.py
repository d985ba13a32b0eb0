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
    say everything: half of c_i stands there at (p_i, q_i), at its mirror (-p_i, -q_i), or at both.
    """

    def __init__(self, base: nn.Linear, count: int, scaling: float) -> None:
        super().__init__(base, count)
        self.factor = scaling / base.weight.numel()
        for name in ("slots", "sources", "lookups"):
            self.register_buffer(name, None, persistent=False)

    def place(self, entries: Tensor) -> None:
        """Say where the coefficients stand. Without this the layer cannot be used."""
        m, n = self.base.weight.shape
        columns = n // 2 + 1
        entries = entries.to(self.theta.device)
        p, q = entries // n, entries % n
        minus_p, minus_q = -p % m, -q % n
        here, mirrored = q < columns, minus_q < columns
        index = torch.arange(len(entries), device=entries.device)
        # At -p: `spread` has a forward transform over p, which is the inverse one at -p.
        slots = [(minus_p * columns + q)[here], (p * columns + minus_q)[mirrored]]
        self.slots, self.sources = torch.cat(slots), torch.cat([index[here], index[mirrored]])
        self.lookups = torch.where(here, p * columns + q, minus_p * columns + minus_q)

    def spread(self, theta: Tensor) -> Tensor:
        m, n = self.base.weight.shape
        columns, rows = n // 2 + 1, m // 2 + 1
        half = theta.new_zeros(m * columns)
        half.index_add_(0, self.slots, theta.index_select(0, self.sources), alpha=0.5 * self.factor)
        # Real in, real out: each pass of the transform needs one half only, and dW[a, b] =
        # dW[-a, -b] gives the other rows. Less than half of the time of irfft2.
        over_p = torch.fft.rfft(half.view(m, columns), dim=0).contiguous()
        update = theta.new_empty(m, n)
        update[:rows] = torch.fft.irfft(over_p, n=n, dim=1, norm="forward")
        mirrored = update[1 : m - rows + 1]
        update[rows:, 1:] = mirrored[:, 1:].flip(0, 1)
        update[rows:, 0] = mirrored[:, 0].flip(0)
        return update

    def gather(self, grad: Tensor) -> Tensor:
        return self.factor * torch.fft.rfft2(grad).flatten()[self.lookups].real


def attach(ctx: Context) -> None:
    count = ctx.hyper.n_frequency
    for name in ctx.targets:
        weight = ctx.model.get_submodule(name).weight
        if count > weight.numel():
            raise SuiteError(
                f"n_frequency {count} is more than {name} {list(weight.shape)} has entries: "
                f"at most {weight.numel()}"
            )
    attach_linears(ctx, lambda base: Frequencies(base, count, ctx.hyper.scaling))


def allowed_sizes(ctx: Context) -> range:
    entries = min(ctx.model.get_submodule(name).weight.numel() for name in ctx.targets)
    return range(1, entries + 1)


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
