"""DiSHA: updates that the shards of a weight share (Kang and Yin, arXiv:2409.15371).

`Shards` is Bone (PEFT's MiSS) and its smaller form, where all shards change alike; `Blocks` is Bat,
where each block's change also depends on the block's own weight.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ballast.adapters import Adapter, adapter_dtype
from ballast.structured import DenseUpdate

GROUPINGS = ("contiguous", "strided")


class Shards(Adapter):
    """y = W0 x + z D with z_k the sum of the inputs of group k; D [r, m].

    grouping: contiguous, group k being the k-th of r blocks of neighbouring inputs (the first n mod
    r of them one longer than the others); or strided, input i belonging to group i mod r.
    tile: columns of a smaller D [r, tile] that is repeated over the outputs, or None.
    """

    def __init__(self, base: nn.Linear, rank: int, grouping: str, tile: int | None = None) -> None:
        super().__init__(base)
        kind = {"dtype": adapter_dtype(base.weight), "device": base.weight.device}
        self.rank, self.grouping = rank, grouping
        self.D = nn.Parameter(torch.zeros(rank, tile or base.out_features, **kind))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        rows = x.flatten(0, -2)
        y = self.base(rows)
        sums = group_sums(rows, self.rank, self.grouping, self.D.dtype)
        if y.dtype == self.D.dtype and self.D.shape[1] == y.shape[1]:
            y.addmm_(sums, self.D)
        else:
            low = F.linear(sums, self.D.T).to(y.dtype)
            y = (y.unflatten(1, (-1, low.shape[1])) + low[:, None]).flatten(1)
        return y.view(*x.shape[:-1], y.shape[-1])

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        m, n = self.base.weight.shape
        groups = group_of_inputs(n, self.rank, self.grouping).to(self.D.device)
        tiled = self.D.T.repeat(m // self.D.shape[1], 1)
        return self.base.weight.to(self.D.dtype) + tiled[:, groups]


def group_of_inputs(n: int, rank: int, grouping: str) -> Tensor:
    """The group, from 0 to r - 1, of each of n inputs."""
    if grouping == "strided":
        return torch.arange(n) % rank
    short, longer = divmod(n, rank)
    sizes = torch.full((rank,), short)
    sizes[:longer] += 1
    return torch.arange(rank).repeat_interleave(sizes)


def group_sums(rows: Tensor, rank: int, grouping: str, dtype: torch.dtype) -> Tensor:
    """Sums [rows, r] of the inputs [rows, n] of each group, accumulated at `dtype`."""
    n = rows.shape[1]
    short, longer = divmod(n, rank)
    if grouping == "strided":
        padded = F.pad(rows, (0, rank - longer)) if longer else rows
        return padded.unflatten(1, (-1, rank)).sum(1, dtype=dtype)
    if not longer:
        return rows.unflatten(1, (rank, short)).sum(2, dtype=dtype)
    parts = rows.split([longer * (short + 1), n - longer * (short + 1)], dim=1)
    counts = longer, rank - longer
    sums = [p.unflatten(1, (c, -1)).sum(2, dtype=dtype) for p, c in zip(parts, counts, strict=True)]
    return torch.cat(sums, dim=1)


class Blocks(DenseUpdate):
    """dW_(i,j) = W0_(i,j) D_i + D_i for the r x r blocks of W0; D is theta [m / r, r, r]."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        m, n = base.weight.shape
        super().__init__(base, m // rank, rank, rank)
        self.across = n // rank

    def spread(self, theta: Tensor) -> Tensor:
        update = torch.bmm(self._stacked(self.base.weight.to(theta.dtype)), theta)
        self._blocks(update).add_(theta[:, :, None])
        return update.view(self.base.weight.shape)

    def gather(self, grad: Tensor) -> Tensor:
        weight = self._stacked(self.base.weight.to(grad.dtype))
        through = torch.bmm(weight.transpose(1, 2), self._stacked(grad))
        return through.add_(self._blocks(grad).sum(2))

    def _stacked(self, matrix: Tensor) -> Tensor:
        """[m, n] -> [m / r, r (n / r), r]: every r-long piece of the rows of block row i."""
        return matrix.view(self.theta.shape[0], -1, self.theta.shape[2])

    def _blocks(self, matrix: Tensor) -> Tensor:
        """[m, n] -> [m / r, r, n / r, r]: block row, row in it, block column, column in it."""
        count, r, _ = self.theta.shape
        return matrix.view(count, r, self.across, r)


def common_divisors(*sizes: int) -> list[int]:
    """The block sizes that divide every one of `sizes`, ascending."""
    common = math.gcd(*sizes)
    return [r for r in range(1, common + 1) if common % r == 0]
