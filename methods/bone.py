"""Bone: the shards of a weight share one small matrix as their update (DiSHA; PEFT's MiSS).

    y = W0 x + z D,   D [r, m] at zero,   z_k = sum of the inputs in group k of r

so that dW's columns within a group are equal: D is the update of every shard. The paper sums r
blocks of n / r neighbouring inputs (`contiguous`, implemented as the default); its released code
and PEFT sum every r-th input (`strided`). The two differ by a permutation of the inputs. Where r
does not divide n, strided groups are those of an input padded with zeros, as in PEFT; contiguous
ones differ by one in length. There is no scale: neither paper nor code has one.

In 2024 "Bone" was the name of what is now called Bat. Trainable per matrix: r m.
"""

from __future__ import annotations

from dataclasses import dataclass

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.disha import Shards
from ballast.structured import attach_linears

declaration = Declaration(
    title="Bone (DiSHA, MiSS)",
    citation="Kang and Yin, DiSHA / MiSS: Revisiting the Trade-off in LoRA with an Efficient "
    "Shard-Sharing Structure, 2024, arXiv:2409.15371",
    family="reparameterization",
    rank="number r of groups into which the inputs are summed, rows of D",
    merges=True,
    learning_rate=2e-5,
    learning_rate_source="the paper's (MetaMathQA, all linears, r 64)",
)


@dataclass(frozen=True)
class Hyper:
    grouping: str = hyper(
        "contiguous",
        "blocks of inputs (paper); strided: released code and PEFT",
        choices=("contiguous", "strided"),
    )


def attach(ctx: Context) -> None:
    attach_linears(ctx, lambda base: Shards(base, ctx.rank, ctx.hyper.grouping))


def parameter_count(m: int, n: int, rank: int) -> int:
    return rank * m
