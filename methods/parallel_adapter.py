"""Parallel adapters: a small network beside the feed-forward block.

    y = ffn(x) + s (D2 relu(D1 x + b1) + b2),   D1 [b, d], D2 [d, b]

placement: ffn is He et al.'s: x is the block's input after the norm, y what is added to the
residual; s = 4 is the paper's for it. linears is that of LLM-Adapters: one network beside every
adapted linear (`modules`; theirs are up and down), from its own input to its own output. With
connector: adapted there is one beside the connector (or beside each of its linears).

D1 starts kaiming uniform and D2 at zero, as in the authors' code, so that training starts from the
base; start: bert is the normal of deviation 0.02 of LLM-Adapters, which is not the base. Cannot be
merged: it is not linear.

Trainable per adapter: b (inputs + outputs), and b + outputs with bias.
"""

from __future__ import annotations

from dataclasses import dataclass

from ballast.bottleneck import (
    Beside,
    attach_bottleneck,
    bottleneck_count,
    connector_targets,
    ends_of_blocks,
    start_bottlenecks,
)
from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError

declaration = Declaration(
    title="Parallel adapter",
    citation="He et al., Towards a Unified View of Parameter-Efficient Transfer Learning, "
    "ICLR 2022, arXiv:2110.04366",
    family="additive",
    rank="width b of the bottleneck",
    merges=False,
    random_start=True,
    learning_rate=2e-4,
    learning_rate_source="LLM-Adapters and PEFT-MLLM lie around it; the paper's 5e-5 is for BART",
)


@dataclass(frozen=True)
class Hyper:
    placement: str = hyper("ffn", "the paper's; LLM-Adapters: linears", choices=("ffn", "linears"))
    scale: float = hyper(4.0, "s of the scaled parallel adapter (paper); LLM-Adapters: 1", low=0.0)
    activation: str = hyper(
        "relu", "paper; LLM-Adapters: tanh", choices=("relu", "gelu", "silu", "tanh")
    )
    bias: bool = hyper(True, "released code; LLM-Adapters has none")
    start: str = hyper(
        "zero", "init_option lora of the released code", choices=("zero", "near", "bert")
    )


def attach(ctx: Context) -> None:
    hyper = ctx.hyper
    for begin, end in _blocks(ctx):
        attach_bottleneck(ctx, Beside, end, hyper.activation, hyper.scale, hyper.bias, begin)


def initialise(ctx: Context) -> None:
    start_bottlenecks(ctx, ctx.hyper.start)


def total_parameters(ctx: Context, rank: int) -> int:
    return sum(bottleneck_count(n, m, rank, ctx.hyper.bias) for n, m in _sides(ctx))


def allowed_sizes(ctx: Context) -> range:
    return range(1, min(min(sides) for sides in _sides(ctx)) + 1)


def _sides(ctx: Context) -> list[tuple[int, int]]:
    """(inputs, outputs) of each adapter."""
    ends = [[ctx.model.get_submodule(name) for name in block] for block in _blocks(ctx)]
    return [(first.in_features, last.out_features) for first, last in ends]


def _blocks(ctx: Context) -> list[tuple[str, str]]:
    """(first, last) linear of what each adapter stands beside."""
    if ctx.hyper.placement == "linears":
        if ctx.anatomy.embeddings in ctx.targets:
            raise SuiteError(
                f"modules: {ctx.anatomy.embeddings} is an embedding; placement: linears needs "
                "linears alone"
            )
        return [(name, name) for name in ctx.targets]
    begins = {}
    for name in ctx.anatomy.linears(ctx.model, ctx.anatomy.layers, None):
        if ctx.anatomy.role(name) == "up":
            begins[_layer(ctx, name)] = name
    connector = connector_targets(ctx)
    return [
        (connector[0] if ctx.in_connector(end) else begins[_layer(ctx, end)], end)
        for end in ends_of_blocks(ctx, ("down",))
    ]


def _layer(ctx: Context, name: str) -> str:
    """Which layer a linear lies in."""
    return name.removeprefix(f"{ctx.anatomy.layers}.").split(".")[0]
