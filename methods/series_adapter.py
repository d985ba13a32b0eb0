"""Series adapters: a small network behind a sublayer, before its residual is added.

    h = h + D2 act(D1 h + b1) + b2,   D1 [b, d], D2 [d, b],   h the sublayer's output

placement: houlsby puts one behind attention and one behind the feed-forward block, pfeiffer
(Pfeiffer et al., AdapterFusion, arXiv:2005.00247) one behind the feed-forward block only; that is,
on the linears `o` and `down`. With connector: adapted there is one behind the connector.

start: zero makes D2 zero, so that training starts from the base; near is Houlsby's normal with
deviation 0.01 cut off at two deviations (its code takes 0.001), bert the 0.02 of LLM-Adapters,
whose adapters also have tanh, no bias, and stand *before* each of gate and up. Houlsby trains the
layer norms and a classifier too; here nothing but the adapters trains. Cannot be merged: it is not
linear.

Trainable per adapter: 2 d b, and b + d with bias.
"""

from __future__ import annotations

from dataclasses import dataclass

from ballast.bottleneck import (
    Behind,
    attach_bottleneck,
    bottleneck_count,
    ends_of_blocks,
    start_bottlenecks,
)
from ballast.context import Context
from ballast.declare import Declaration, hyper

declaration = Declaration(
    title="Series adapter",
    citation="Houlsby et al., Parameter-Efficient Transfer Learning for NLP, ICML 2019, "
    "arXiv:1902.00751",
    family="additive",
    rank="width b of the bottleneck",
    merges=False,
    random_start=True,
    learning_rate=3e-4,
    learning_rate_source="of the paper's 3e-5, 3e-4, 3e-3, the one of LLM-Adapters on LLaMA",
)


@dataclass(frozen=True)
class Hyper:
    placement: str = hyper(
        "houlsby", "the paper's, behind both sublayers", choices=("houlsby", "pfeiffer")
    )
    activation: str = hyper(
        "gelu", "released code; LLM-Adapters: tanh", choices=("relu", "gelu", "silu", "tanh")
    )
    bias: bool = hyper(True, "paper; LLM-Adapters has none")
    start: str = hyper(
        "zero", "the paper's identity, exactly; near is its own", choices=("zero", "near", "bert")
    )


def attach(ctx: Context) -> None:
    for name in _places(ctx):
        attach_bottleneck(ctx, Behind, name, ctx.hyper.activation, bias=ctx.hyper.bias)


def initialise(ctx: Context) -> None:
    start_bottlenecks(ctx, ctx.hyper.start)


def total_parameters(ctx: Context, rank: int) -> int:
    return sum(bottleneck_count(d, d, rank, ctx.hyper.bias) for d in _widths(ctx))


def allowed_sizes(ctx: Context) -> range:
    return range(1, min(_widths(ctx)) + 1)


def _widths(ctx: Context) -> list[int]:
    return [ctx.model.get_submodule(name).out_features for name in _places(ctx)]


def _places(ctx: Context) -> list[str]:
    return ends_of_blocks(ctx, ("o", "down") if ctx.hyper.placement == "houlsby" else ("down",))
