"""VeRA: one random pair of matrices for all layers; each layer trains two vectors that scale it.

    y = W0 x + diag(b) B_m diag(d) A_n x,   b [m] starts at 0, d [r] at 0.1
    A_n = A[:, :n], B_m = B[:m] of one frozen pair A [r, n_max], B [m_max, r] (kaiming uniform)

The pair is drawn once for all targets, shared by reference and stored once; PEFT also stores it, or
draws it again from a key. There is no scale s. r may exceed the sides of a matrix (the paper's
1,024 does): these are more random directions to weigh, not a rank above min(m, n). Only b is
decayed: b = 0 is the base, d = 0 is the end of learning. Linear modules only, as in PEFT.

Cost. Two ways give the same update and the same gradients, and the cheaper one is taken per matrix
and number of tokens t, in multiplications beyond the frozen layer's 2 t m n:

    low-rank   2 t r (m + n)              A x, B(.), and back; keeps A x and B(.) of every token
    dense      2 m n r + t r (m + n)      W0 + diag(b) B diag(d) A is formed, once per direction;
               or 3 m n r + t m n         gradients through A x, or through dL/dW A^T

Relative to the frozen layer, with m = n: 2 r / n, r / t + r / n or 1.5 r / t + 1/2. The bound at t
= 1,024 and n = 512 is so 5 % at r 16, 75 % at r 256 and 200 % at r 1,024, where the low-rank way
alone costs 6, 100 and 400 %. The dense way keeps nothing of tokens but the layer's input, and needs
one precision throughout: on bf16 bases the low-rank way is taken, because rounding the formed
weight to bf16 would give other numbers. Trainable per matrix: m + r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ballast.adapters import Adapter, LoraForm, adapter_dtype
from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError

declaration = Declaration(
    title="VeRA",
    citation="Kopiczko, Blankevoort and Asano, VeRA: Vector-based Random Matrix Adaptation, "
    "ICLR 2024, arXiv:2310.11454",
    family="reparameterization",
    rank="number r of random directions that all layers share",
    merges=True,
    random_start=True,
    learning_rate=4e-3,
    learning_rate_source="the paper's Table 9, instruction tuning of LLaMA (LoRA there: 4e-4)",
)

LARGEST_RANK = 2**16


@dataclass(frozen=True)
class Hyper:
    d_initial: float = hyper(0.1, "the paper's; 1.0 fails in its ablation", low=1e-7, high=1.0)
    dropout: float = hyper(0.0, "PEFT's default", low=0.0, high=0.99)


class Vera(Adapter):
    """diag(b) B diag(d) A beside a Linear; A [r, n] and B [m, r] are views of the shared pair.

    Raises ValueError for r < 1.
    """

    def __init__(self, base: nn.Linear, rank: int, dropout: float = 0.0) -> None:
        super().__init__(base)
        if rank < 1:
            raise ValueError(f"rank {rank}: a rank of at least 1 is needed")
        kind = {"dtype": adapter_dtype(base.weight), "device": base.weight.device}
        self.rank, self.dropout = rank, dropout
        self.b = nn.Parameter(torch.zeros(base.weight.shape[0], **kind))
        self.d = nn.Parameter(torch.zeros(rank, **kind))
        self.register_buffer("A", None, persistent=False)
        self.register_buffer("B", None, persistent=False)

    def share(self, a: Tensor, b: Tensor) -> None:
        """Take this layer's slices of the shared A [r, n_max] and B [m_max, r]."""
        m, n = self.base.weight.shape
        self.A, self.B = a[:, :n].to(self.d.device), b[:m].to(self.d.device)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        rows = x.flatten(0, -2)
        way = self.way(rows)
        if way == "low":
            y = self._add_low(self.base(rows), rows)
        else:
            y = self._formed(rows, way)
            y = y if self.base.bias is None else y + self.base.bias
        return y.view(*x.shape[:-1], y.shape[-1])

    def way(self, rows: Tensor) -> str:
        """The cheapest way for rows [t, n] that gives the same numbers, of `multiplications`."""
        mixed = torch.is_autocast_enabled(rows.device.type)
        one_precision = not mixed and rows.dtype == self.base.weight.dtype == self.d.dtype
        if not one_precision or (self.dropout and self.training):
            return "low"
        learns = torch.is_grad_enabled() and self.b.requires_grad
        ways = multiplications(len(rows), *self.base.weight.shape, self.rank, learns)
        return min(ways, key=lambda name: ways[name])

    def _formed(self, rows: Tensor, way: str) -> Tensor:
        """(W0 + diag(b) B diag(d) A) x for rows x."""
        factors = self.A, self.B, self.b, self.d
        return _Formed.apply(rows, self.base.weight, *factors, way == "gradient")

    def _add_low(self, y: Tensor, rows: Tensor) -> Tensor:
        """y + diag(b) B diag(d) A x for rows x."""
        x = F.dropout(rows, self.dropout, self.training) if self.dropout else rows
        low = F.linear(x.to(self.d.dtype), self.A) * self.d
        update = F.linear(low, self.B)
        if y.dtype == update.dtype == self.b.dtype:
            return y.addcmul_(update, self.b)
        return y + (update * self.b).to(y.dtype)

    def delta(self) -> Tensor:
        """diag(b) B diag(d) A [m, n]."""
        return (self.b[:, None] * self.B) @ (self.d[:, None] * self.A)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return self.base.weight.to(self.d.dtype) + self.delta()

    @torch.no_grad()
    def as_lora(self) -> LoraForm:
        return LoraForm(self.d[:, None] * self.A, self.b[:, None] * self.B)


def multiplications(t: int, m: int, n: int, r: int, learns: bool) -> dict[str, int]:
    """Multiplications of each way beyond the frozen layer's, for t tokens.

    low: low-rank; dense: weight formed, gradients through A x; gradient: formed, through dL/dW.
    """
    if not learns:
        return {"low": t * r * (m + n), "dense": m * n * r}
    return {
        "low": 2 * t * r * (m + n),
        "dense": 2 * m * n * r + t * r * (m + n),
        "gradient": 3 * m * n * r + t * m * n,
    }


class _Formed(torch.autograd.Function):
    """x (W0 + diag(b) B diag(d) A)^T with the exact gradients to x, b and d, W formed twice.

    With M = dL/dDelta A^T [m, r]: dL/db = rowsum(B diag(d) o M), dL/dd = colsum(diag(b) B o M); M
    comes from dL/dDelta = g^T x or from g^T (x A^T), whichever costs less.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b_: Tensor, b: Tensor, d: Tensor, full: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b_, b, d)
        ctx.full = full
        return F.linear(x, _turned(weight, a, b_, b, d))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b_, b, d = ctx.saved_tensors
        need_x, _, _, _, need_b, need_d, _ = ctx.needs_input_grad
        to_x = grad @ _turned(weight, a, b_, b, d) if need_x else None
        to_b = to_d = None
        if need_b or need_d:
            m = (grad.T @ x) @ a.T if ctx.full else grad.T @ (x @ a.T)
            m = m * b_
            to_b, to_d = m @ d, b @ m
        return to_x, None, None, None, to_b, to_d, None


def _turned(weight: Tensor, a: Tensor, b_: Tensor, b: Tensor, d: Tensor) -> Tensor:
    """W0 + diag(b) B diag(d) A [m, n]."""
    return torch.addmm(weight, b[:, None] * b_ * d, a)


def attach(ctx: Context) -> None:
    attach_vera(ctx, Vera)


def attach_vera(ctx: Context, layer: type[Vera]) -> None:
    """Replace every target by a layer of the VeRA family.

    Raises SuiteError without a rank or targets, for a rank that cannot be meant, for embeddings.
    """
    if ctx.rank is None or not ctx.targets:
        raise SuiteError("rank, modules: this method needs a rank and modules to adapt")
    if not 1 <= ctx.rank <= LARGEST_RANK:
        raise SuiteError(f"rank {ctx.rank}: allowed here are 1 to {LARGEST_RANK}, whatever m and n")
    for name in ctx.targets:
        base = ctx.model.get_submodule(name)
        if not isinstance(base, nn.Linear):
            raise SuiteError(
                f"modules: {name} is an embedding, whose vocabulary would set the size of the "
                "matrices that all layers share; VeRA is for linear modules only"
            )
        ctx.replace(name, layer(base, ctx.rank, ctx.hyper.dropout))


@torch.no_grad()
def initialise(ctx: Context) -> None:
    layers = [layer for _, layer in ctx.adapters()]
    dtype = layers[0].d.dtype
    m, n = (max(layer.base.weight.shape[i] for layer in layers) for i in (0, 1))
    for name, shape in (("A", (ctx.rank, n)), ("B", (m, ctx.rank))):
        matrix = torch.empty(shape, dtype=dtype)
        ctx.state[name] = nn.init.kaiming_uniform_(matrix, generator=ctx.generator)
    for layer in layers:
        layer.d.fill_(ctx.hyper.d_initial)
        layer.b.zero_()
    restored(ctx)


def restored(ctx: Context) -> None:
    a, b = ctx.state["A"], ctx.state["B"]
    device = next(layer.d.device for _, layer in ctx.adapters())
    a, b = a.to(device), b.to(device)
    for _, layer in ctx.adapters():
        layer.share(a, b)


def parameter_groups(ctx: Context) -> list[dict[str, Any]]:
    weights = [f"{name}.d" for name, _ in ctx.adapters()]
    others = [name for name in ctx.own() if name not in set(weights)]
    return [{"params": others}, {"params": weights, "weight_decay": 0.0}]


def allowed_sizes(ctx: Context) -> range:
    """Ranks, which no matrix bounds."""
    return range(1, LARGEST_RANK + 1)


def parameter_count(m: int, n: int, rank: int) -> int:
    return m + rank
