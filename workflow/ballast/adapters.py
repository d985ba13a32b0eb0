"""Layers that carry an adapter: the common mathematics of the low-rank family.

Notation of every file here: W0 is a weight [m, n] = [out, in]; A is [r, n], B is [m, r]; s is the
scale that takes effect; y = x W0^T + s (x A^T) B^T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """A module in place of `base`, with parameters of its own.

    Everything that is not under `base` is the adapter: its parameters train, its persistent buffers
    are saved with them. Adapter parameters are kept in fp32 (or float64 for a float64 base),
    whatever the base's precision.
    """

    base: nn.Module

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)

    def own_tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of the adapter alone, by name, live (not copies)."""
        names = [n for n, _ in self.named_parameters()] + [n for n, _ in self.named_buffers()]
        stored = self.state_dict(keep_vars=True)
        return {n: stored[n] for n in names if n in stored and not n.startswith("base.")}

    def restored(self) -> None:
        """Called when stored tensors have been put in place: rebuild what depends on them."""

    def merged(self) -> nn.Module:
        """A plain module of the base's class with the same outputs.

        The base's module itself is changed and returned; the adapter is not usable afterwards. Its
        weight becomes a parameter of its own: writing into the old one would also change a head
        that is tied to an adapted embedding, which the adapter does not.
        """
        weight = self.merged_weight().to(self.base.weight.dtype)
        self.base.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        return self.base

    def merged_weight(self) -> Tensor:
        """The weight of `merged()`, at the adapter's precision."""
        raise TypeError(f"{type(self).__name__} cannot be merged")

    def as_lora(self) -> LoraForm | None:
        """The adapter as LoRA on the untouched base, or None where it is none."""
        return None


@dataclass(frozen=True)
class LoraForm:
    """W0 + scale b a, or with a magnitude [m] the rows of that, each of this length (DoRA).

    a [r, n], b [m, r]; on an Embedding, whose weight is [V, d], a [r, V] and b [d, r].
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """Precision of an adapter on `weight`: fp32, or float64 where the base is float64."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class LowRank(Adapter):
    """y = x W0^T + s (x A^T) B^T on a Linear, or its embedding form (loralib's layout).

    On nn.Linear: A [r, in], B [out, r]. On nn.Embedding with weight [V, d]: A [r, V], B [d, r],
    delta W = s (B A)^T, and the zero of the initialisation lies in A.

    An *offset* (A0, B0), where a method sets one, is subtracted from the base: the layer computes
    (W0 - s B0 A0) x + s B A x. It is stored with the adapter, so that PiSSA, MiLoRA and OLoRA
    reload on an untouched base without decomposing it again.

    Raises ValueError for r < 1 and for modules that are neither Linear nor Embedding.
    """

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base)
        if rank < 1:
            raise ValueError(f"rank {rank}: a rank of at least 1 is needed")
        if not isinstance(base, nn.Linear | nn.Embedding):
            raise ValueError(f"{type(base).__name__}: only Linear and Embedding can be adapted")
        if hasattr(base, "embed_scale"):
            raise ValueError(f"{type(base).__name__}: embeddings that scale are not supported")
        rows, columns = base.weight.shape
        self.is_embedding = isinstance(base, nn.Embedding)
        if self.is_embedding:
            rows, columns = columns, rows
        kind = {"dtype": adapter_dtype(base.weight), "device": base.weight.device}
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.A = nn.Parameter(torch.zeros(rank, columns, **kind))
        self.B = nn.Parameter(torch.zeros(rows, rank, **kind))
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        if self.is_embedding:
            return self.base(x) + self._low(x).to(self.base.weight.dtype)
        # Rows flattened once: the update is then added to the base's output in place.
        rows = x.flatten(0, -2)
        y = self._add_low(self.base(rows), rows)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _add_low(self, y: Tensor, x: Tensor) -> Tensor:
        """y + s (x A^T) B^T for rows x, by one fused kernel where the precisions agree."""
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        if y.dtype == self.A.dtype:
            return y.addmm_(F.linear(x, self.A), self.up().T, alpha=self.scale)
        low = self.scale * F.linear(x.to(self.A.dtype), self.A)
        return y + F.linear(low, self.up()).to(y.dtype)

    def _low(self, tokens: Tensor) -> Tensor:
        """The embedding's update for tokens, at the adapter's precision."""
        low = F.embedding(tokens, self.A.T, self.base.padding_idx)
        return self.scale * F.linear(low, self.up())

    def up(self) -> Tensor:
        """What takes the r inner dimensions to the outputs [m, r]: B, or B times a small core."""
        return self.B

    def delta(self) -> Tensor:
        """s B A, of the base weight's shape, without the offset."""
        update = self.scale * (self.up() @ self.A)
        return update.T if self.is_embedding else update

    @torch.no_grad()
    def set_offset(self, a: Tensor, b: Tensor) -> None:
        """Start from A = a, B = b and subtract their product from the base: unchanged outputs."""
        self.A.copy_(a)
        self.B.copy_(b)
        self.A0, self.B0 = self.A.detach().clone(), self.B.detach().clone()
        self._subtract_offset()

    def _subtract_offset(self) -> None:
        weight = self.base.weight
        start = self.scale * (self.B0 @ self.A0)
        weight.data = (weight.to(start.dtype) - start).to(weight.dtype)

    @torch.no_grad()
    def restored(self) -> None:
        if self.A0 is not None:
            self._subtract_offset()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return self.base.weight.to(self.A.dtype) + self.delta()

    @torch.no_grad()
    def as_lora(self) -> LoraForm | None:
        """s B A; an offset joins it, so that the base is the base: s (B A - B0 A0), of rank 2r."""
        a, b = self.A, self.up()
        if self.A0 is not None:
            a, b = torch.cat([a, self.A0]), torch.cat([b, -self.B0], 1)
        return LoraForm(a, b, self.scale)
