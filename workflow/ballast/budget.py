"""Equal budgets: the rank, or size, at which a method trains as much as a suite allows.

A suite asks for a share of the base's parameters ("0.5%"), for a count (20000), or for the bytes of
the trained tensors in fp32 ("64kB"). Each method takes the largest rank that stays within it.
"""

from __future__ import annotations

import dataclasses
import re
from bisect import bisect_right
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from ballast.declare import Declaration
from ballast.errors import SuiteError

BYTES = {"B": 1, "kB": 1000, "MB": 10**6, "GB": 10**9}
BYTES_EACH = 4  # adapters are kept in fp32
LARGEST_SIZE = 1_000_000


def parse_budget(text: str | int) -> tuple[str, float]:
    """("share", 0.005), ("count", 20000.0) or ("bytes", 64000.0).

    Raises SuiteError for anything else, and for what is not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|B|kB|MB|GB)?", str(text).strip())
    if found is None or float(found[1]) <= 0:
        raise SuiteError(
            f"budgets: {text!r}; allowed: a share of the base such as 0.5%, a count such as 20000, "
            "or bytes such as 64kB"
        )
    amount, unit = float(found[1]), found[2]
    if unit == "%":
        return "share", amount / 100
    return ("bytes", amount * BYTES[unit]) if unit else ("count", amount)


def label(text: str | int) -> str:
    """A budget as part of a variant's name: at-0.5pct, at-20000, at-64kB."""
    return "at-" + str(text).replace("%", "pct").replace(" ", "")


def parameters_within(text: str | int, total: int) -> int:
    """How many parameters a budget allows on a base of `total` parameters."""
    kind, amount = parse_budget(text)
    return int({"share": amount * total, "count": amount, "bytes": amount / BYTES_EACH}[kind])


def resolve(
    text: str | int, method: ModuleType, declaration: Declaration, ctx: Any
) -> dict[str, float]:
    """Set the context's rank, or the hyper-parameter that is the method's size, to a budget.

    Returns what was asked and taken: budget_parameters, resolved_size, resolved_parameters.
    Raises SuiteError if even the smallest size is too large.
    """
    total = sum(p.numel() for p in ctx.model.parameters())
    allowed = parameters_within(text, total)
    sizes = _sizes(method, declaration, ctx)
    place = bisect_right(sizes, allowed, key=lambda size: trained_parameters(method, ctx, size))
    if place == 0:
        least = trained_parameters(method, ctx, sizes[0])
        raise SuiteError(
            f"budgets: {text} allows {allowed} parameters, but the smallest size of this method, "
            f"{sizes[0]}, trains {least}"
        )
    size = sizes[place - 1]
    if declaration.rank:
        ctx.rank = size
    else:
        ctx.hyper = dataclasses.replace(ctx.hyper, **{declaration.size: size})
    return {
        "budget_parameters": allowed,
        "resolved_size": size,
        "resolved_parameters": trained_parameters(method, ctx, size),
    }


def trained_parameters(method: ModuleType, ctx: Any, size: int) -> int:
    """A method's own trainable count at a rank or size, by its formula."""
    from ballast.lowrank import target_shapes

    if hasattr(method, "total_parameters"):
        return int(method.total_parameters(ctx, size))
    return sum(method.parameter_count(m, n, size) for m, n in target_shapes(ctx))


def _sizes(method: ModuleType, declaration: Declaration, ctx: Any) -> Sequence[int]:
    """Sizes that a method allows on this base, ascending."""
    from ballast.lowrank import target_shapes

    if hasattr(method, "allowed_sizes"):
        return list(method.allowed_sizes(ctx))
    limit = min(map(min, target_shapes(ctx))) if declaration.rank else LARGEST_SIZE
    return range(1, limit + 1)
