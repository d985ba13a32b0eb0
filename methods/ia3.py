"""(IA)^3: three trained vectors per layer scale what flows through it.

    k = l_k o (W_k x),   v = l_v o (W_v x),   ffn(x) = W_down (l_ff o f(x)),   every l starts at 1

l_k and l_v scale outputs, bias included; l_ff scales the input of the feed-forward block's last
linear, f(x) being what the block computes before it. Merged exactly: rows of W_k and W_v, columns
of W_down. As in PEFT's IA3. No weight decay: it would pull the scales to 0 rather than to 1.

Only linears among the suite's `modules` are scaled. There is no rank and no size. Trainable: the
widths of k and v and of the feed-forward block's inside, summed over the layers.

Small bases: in config/all-methods.yaml its 1,344 numbers learn the form of the answers and little
of the task (micro-lm: 12.2 to 2.0 nats per token, 7 % exact at the best of rates 0.009 to 0.27):
scales can only weigh what the frozen base computes already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ballast.adapters import Adapter, adapter_dtype
from ballast.context import Context
from ballast.declare import Declaration
from ballast.errors import SuiteError

ROLES = ("k", "v", "down")

declaration = Declaration(
    title="(IA)^3",
    citation="Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than "
    "In-Context Learning, NeurIPS 2022, arXiv:2205.05638",
    family="additive",
    merges=True,
    learning_rate=3e-3,
    learning_rate_source="the paper's, T-Few with Adafactor",
)


class Scaled(Adapter):
    """l o (W x + bias), or W (l o x) + bias where it scales inputs; `scales` [m] or [n] trains."""

    def __init__(self, base: nn.Linear, of_inputs: bool) -> None:
        super().__init__(base)
        self.of_inputs = of_inputs
        width = base.in_features if of_inputs else base.out_features
        kind = {"dtype": adapter_dtype(base.weight), "device": base.weight.device}
        self.scales = nn.Parameter(torch.ones(width, **kind))

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        if self.of_inputs:
            return self.base((x * self.scales).to(x.dtype))
        y = self.base(x)
        return (y * self.scales).to(y.dtype)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        weight = self.base.weight.to(self.scales.dtype)
        return weight * (self.scales if self.of_inputs else self.scales[:, None])

    @torch.no_grad()
    def merged(self) -> nn.Module:
        bias = self.base.bias
        if bias is not None and not self.of_inputs:
            scaled = (bias.to(self.scales.dtype) * self.scales).to(bias.dtype)
            self.base.bias = nn.Parameter(scaled, requires_grad=False)
        return super().merged()


def attach(ctx: Context) -> None:
    if ctx.connector == "adapted":
        raise SuiteError(
            "connector: adapted, but (IA)^3 scales keys, values and feed-forward blocks only; use "
            "tuned or frozen"
        )
    for name in _places(ctx):
        of_inputs = ctx.anatomy.role(name) == "down"
        ctx.replace(name, Scaled(ctx.model.get_submodule(name), of_inputs))


def parameter_groups(ctx: Context) -> list[dict[str, Any]]:
    return [{"params": list(ctx.own()), "weight_decay": 0.0}]


def total_parameters(ctx: Context, size: None = None) -> int:
    total = 0
    for name in _places(ctx):
        rows, columns = ctx.model.get_submodule(name).weight.shape
        total += columns if ctx.anatomy.role(name) == "down" else rows
    return total


def _places(ctx: Context) -> list[str]:
    chosen = [name for name in ctx.targets if ctx.anatomy.role(name) in ROLES]
    if not chosen:
        raise SuiteError(
            "modules: none of those adapted is a key, a value or the end of a feed-forward block; "
            "use modules: all, or name them; an embedding is not scaled"
        )
    return chosen
