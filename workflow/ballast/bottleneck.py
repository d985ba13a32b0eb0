"""Bottleneck adapters: a small network beside or behind a linear layer of the base.

    net(x) = s (D2 act(D1 x + b1) + b2),   D1 [b, n], D2 [m, b]

behind it: y + net(y) with y the layer's output; beside it: y + net(x) with x the input of the
layer, or of an earlier one of the same block (a feed-forward block begins at `up` and ends at
`down`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ballast.adapters import Adapter, adapter_dtype
from ballast.context import Context
from ballast.errors import SuiteError

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class Bottleneck(Adapter):
    """The network `net` on the linear `base`; what it reads is said by a subclass.

    down [b, inputs], up [outputs of base, b], and with `bias` down_bias [b], up_bias [outputs].
    """

    def __init__(
        self, base: nn.Linear, inputs: int, width: int, activation: str, scale: float, bias: bool
    ) -> None:
        super().__init__(base)
        kind = {"dtype": adapter_dtype(base.weight), "device": base.weight.device}
        outputs = base.out_features
        self.activation, self.scale = activation, scale
        self.down = nn.Parameter(torch.zeros(width, inputs, **kind))
        self.up = nn.Parameter(torch.zeros(outputs, width, **kind))
        self.down_bias = nn.Parameter(torch.zeros(width, **kind)) if bias else None
        self.up_bias = nn.Parameter(torch.zeros(outputs, **kind)) if bias else None

    def net(self, x: Tensor) -> Tensor:
        """s (D2 act(D1 x + b1) + b2), of x's precision."""
        inner = F.linear(x.to(self.down.dtype), self.down, self.down_bias)
        out = F.linear(ACTIVATIONS[self.activation](inner), self.up, self.up_bias)
        return (self.scale * out if self.scale != 1 else out).to(x.dtype)


class Behind(Bottleneck):
    """y + net(y), y = base(x): series."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        y = self.base(x)
        return y + self.net(y)


class Beside(Bottleneck):
    """base(x) + net(z): parallel. z is x, or what `see` saw last: the block's own input."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._seen: Tensor | None = None

    def see(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of the block's first linear."""
        self._seen = inputs[0]

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        z, self._seen = x if self._seen is None else self._seen, None
        return self.base(x) + self.net(z)


def attach_bottleneck(
    ctx: Context,
    kind: type[Bottleneck],
    name: str,
    activation: str,
    scale: float = 1.0,
    bias: bool = True,
    begin: str | None = None,
) -> None:
    """Put a bottleneck of the cell's rank on the linear `name`.

    begin: the linear where the block begins whose input the network reads (`Beside`); None for the
    linear itself. Raises SuiteError for a rank that is larger than what it should be narrower than.
    """
    base = ctx.model.get_submodule(name)
    first = ctx.model.get_submodule(begin or name)
    inputs = base.out_features if issubclass(kind, Behind) else first.in_features
    limit = min(inputs, base.out_features)
    if ctx.rank > limit:
        raise SuiteError(
            f"rank {ctx.rank} is larger than {name} [{base.out_features}, {base.in_features}] "
            f"allows: at most {limit}, or the bottleneck is none"
        )
    adapter = kind(base, inputs, ctx.rank, activation, scale, bias)
    ctx.replace(name, adapter)
    if begin and begin != name:
        first.register_forward_pre_hook(adapter.see)


def bottleneck_count(inputs: int, outputs: int, rank: int, bias: bool) -> int:
    """Numbers that train in one bottleneck."""
    return rank * (inputs + outputs) + (rank + outputs if bias else 0)


@torch.no_grad()
def start_bottlenecks(ctx: Context, start: str) -> None:
    """Values of the weights; biases stay zero.

    zero: D1 kaiming uniform (a = sqrt 5), D2 = 0, so that nothing changes (He et al.); near: both
    normal with deviation 0.01, cut off at two deviations (Houlsby et al.); bert: both normal with
    deviation 0.02 (LLM-Adapters). The last two start near the base, not at it.
    """
    for _, layer in ctx.adapters():
        if start == "zero":
            fresh = torch.empty(layer.down.shape, dtype=layer.down.dtype)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=ctx.generator)
            layer.down.copy_(fresh)
            layer.up.zero_()
            continue
        for weight in (layer.down, layer.up):
            fresh = torch.empty(weight.shape, dtype=weight.dtype)
            if start == "near":
                nn.init.trunc_normal_(fresh, 0.0, 0.01, -0.02, 0.02, generator=ctx.generator)
            else:
                nn.init.normal_(fresh, 0.0, 0.02, generator=ctx.generator)
            weight.copy_(fresh)


def ends_of_blocks(ctx: Context, roles: tuple[str, ...]) -> list[str]:
    """Targets in the decoder layers that have one of these roles, and the connector's last linear.

    Raises SuiteError if there are none: `modules` names what may be adapted at all.
    """
    chosen = [name for name in ctx.targets if ctx.anatomy.role(name) in roles]
    if not chosen:
        raise SuiteError(
            f"modules: none of those adapted is the end of a block ({' or '.join(roles)}); use "
            "modules: all, or name the linears there; an embedding cannot be adapted"
        )
    return chosen + [linears[-1] for linears in [connector_targets(ctx)] if linears]


def connector_targets(ctx: Context) -> list[str]:
    """Adapted linears of the connector, from its input to its output."""
    return [name for name in ctx.targets if ctx.in_connector(name)]
