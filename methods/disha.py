"""DiSHA: all shards of a weight share one small matrix D as their update, dW = expand(D).

    y = W0 x + z [D D ... D],   D [r, tile] at zero,   z as in Bone

The general form of the family: D is repeated over r groups of inputs and over the outputs, so that
outputs o and o + tile change alike. tile = m is Bone, which has a file of its own; PEFT's MiSS
"mini" is this with tile = mini_r, whose default of one column is kept. tile has to divide every m.
Trainable per matrix: r tile.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.disha import Shards, common_divisors
from ballast.errors import SuiteError
from ballast.structured import attach_linears

from .bone import Hyper as Bone

declaration = Declaration(
    title="DiSHA",
    citation="Kang and Yin, DiSHA / MiSS: Revisiting the Trade-off in LoRA with an Efficient "
    "Shard-Sharing Structure, 2024, arXiv:2409.15371",
    family="reparameterization",
    rank="number r of groups into which the inputs are summed, rows of D",
    merges=True,
    learning_rate=2e-5,
    learning_rate_source="that of Bone",
)


@dataclass(frozen=True)
class Hyper(Bone):
    tile: int = hyper(1, "mini_r of PEFT: columns of D", low=1)


def attach(ctx: Context) -> None:
    tile = ctx.hyper.tile

    def shards(base: nn.Linear) -> Shards:
        return Shards(base, ctx.rank, ctx.hyper.grouping, tile)

    outputs = [ctx.model.get_submodule(name).weight.shape[0] for name in ctx.targets]
    if any(m % tile for m in outputs):
        allowed = ", ".join(map(str, common_divisors(*outputs)))
        raise SuiteError(f"tile {tile} does not divide every adapted output; allowed: {allowed}")
    attach_linears(ctx, shards)


def total_parameters(ctx: Context, rank: int) -> int:
    return len(ctx.targets) * rank * ctx.hyper.tile
