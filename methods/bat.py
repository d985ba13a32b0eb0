"""Bat: DiSHA whose update also depends on the weight, block by block.

    dW_(i,j) = W0_(i,j) D_i + D_i,   W0_(i,j) the r x r blocks of W0,   D [m / r, r, r] at zero

All blocks of a block row share D_i, but through W0_(i,j) they change differently, which Bone's
shards cannot. r has to divide both sides of every adapted matrix. No scale (paper and PEFT).

The update is dense: W0 + dW is formed once per forward, and D's gradient follows from that of the
whole weight by the adjoint of the formula above. Trainable per matrix: r m.
"""

from __future__ import annotations

from ballast.context import Context
from ballast.declare import Declaration
from ballast.disha import Blocks, common_divisors
from ballast.errors import SuiteError
from ballast.structured import attach_linears

declaration = Declaration(
    title="Bat (DiSHA)",
    citation="Kang and Yin, DiSHA / MiSS: Revisiting the Trade-off in LoRA with an Efficient "
    "Shard-Sharing Structure, 2024, arXiv:2409.15371",
    family="reparameterization",
    rank="side r of the square blocks",
    merges=True,
    learning_rate=2e-5,
    learning_rate_source="the paper's (MetaMathQA, all linears, r 64)",
)


def attach(ctx: Context) -> None:
    allowed = allowed_sizes(ctx)
    shapes = _shapes(ctx)
    attach_linears(ctx, lambda base: Blocks(base, ctx.rank))
    if ctx.rank not in allowed:
        name = next(n for n, shape in shapes.items() if any(side % ctx.rank for side in shape))
        raise SuiteError(
            f"rank {ctx.rank} does not divide {name} {list(shapes[name])} into square blocks; "
            f"ranks that fit every adapted module: {', '.join(map(str, allowed))}"
        )


def allowed_sizes(ctx: Context) -> list[int]:
    return common_divisors(*(side for shape in _shapes(ctx).values() for side in shape))


def _shapes(ctx: Context) -> dict[str, tuple[int, ...]]:
    return {name: tuple(ctx.model.get_submodule(name).weight.shape) for name in ctx.targets}


def parameter_count(m: int, n: int, rank: int) -> int:
    return rank * m
