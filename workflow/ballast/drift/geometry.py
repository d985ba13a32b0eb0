"""Distances between two models: of predictions, features and weights. One function for each.

Everything is computed in float64. `ballast.measures` says what the numbers mean. torch itself is
not imported: what only reads tables can afford the registry.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TOP_SHARE = 0.1  # of a matrix's directions that count as its top


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that there are, None if there are none."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def kl(base: Tensor, tuned: Tensor) -> float:
    """KL(base || tuned) = sum p_base (log p_base - log p_tuned), the mean over tokens, in nats.

    base, tuned: log-probabilities [tokens, V]. At least 0; what rounding puts below is 0.
    """
    old, new = base.double(), tuned.double()
    return _not_below_zero(float(_expected(old, old - new).mean()))


def forgetting_loss(base: Tensor, tuned: Tensor) -> float:
    """MiLoRA's forgetting loss: -sum p_base log p_tuned, the mean over tokens, in nats.

    base, tuned: log-probabilities [tokens, V]. An untouched base has its own entropy.
    """
    return float(-_expected(base.double(), tuned.double()).mean())


def kl_corrected(base: Tensor, tuned: Tensor) -> float:
    """MiLoRA's forgetting loss less the base's entropy, in nats: 0 for an untouched base.

    Over the same tokens it equals `kl`; as the loss itself, it is compared within a base only.
    """
    return _not_below_zero(forgetting_loss(base, tuned) - forgetting_loss(base, base))


def _not_below_zero(value: float) -> float:
    """The value, 0 where rounding put it below; NaN stays (`max` would make it 0)."""
    return 0.0 if value < 0 else value


def _expected(logs: Tensor, values: Tensor) -> Tensor:
    """Sum over the last axis of p values; what has probability 0 counts as 0."""
    weights = logs.exp()
    return (weights * values).masked_fill(weights == 0, 0.0).sum(-1)


def weight_change(delta: Tensor, weight: Tensor) -> float | None:
    """||dW|| / ||W0|| of one matrix, Frobenius norms; None for a W0 of zeros."""
    size = float(weight.double().norm())
    return float(delta.double().norm()) / size if size else None


def activation_change(change: Tensor, inputs: Tensor) -> float | None:
    """Mean over tokens of ||D(x)|| / ||x||: change [tokens, out] on inputs [tokens, in].

    Tokens with x = 0 do not count; None if there are no others.
    """
    sizes = inputs.double().norm(dim=-1)
    counted = sizes > 0
    ratios = change.double().norm(dim=-1)[counted] / sizes[counted]
    return float(ratios.mean()) if len(ratios) else None


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum; 0 for a zero matrix."""
    values = singular_values.double()
    values = values[values > 0]
    shares = values / values.sum()
    return float((-(shares * shares.log()).sum()).exp()) if len(values) else 0.0


def changed_share(changed: int, linears: int) -> float:
    """Share of the linears that changed at all; 0 to 1."""
    return changed / linears if linears else 0.0


def density(delta: Tensor) -> float:
    """Share of the entries of dW that are not 0; 0 to 1."""
    return int(delta.count_nonzero()) / delta.numel()


def top_directions(rows: int, columns: int) -> int:
    """How many singular directions of a matrix count as its top: a tenth of them, at least one."""
    return max(1, round(TOP_SHARE * min(rows, columns)))


def top_share(delta: Tensor, left: Tensor, right: Tensor) -> float | None:
    """||U_k^T dW V_k||^2 / ||dW||^2: what of dW [m, n] lies in W0's top space on both sides.

    left [m, k], right [n, k]: orthonormal, W0's singular vectors of the k largest singular values.
    A dW that knows nothing of W0 has k^2 / (m n). None for a dW of zeros.
    """
    whole = float(delta.double().square().sum())
    inside = left.double().T @ delta.double() @ right.double()
    return float(inside.square().sum()) / whole if whole else None


def cka(base: Tensor, tuned: Tensor) -> float | None:
    """Linear CKA of features [tokens, width] of the same tokens; 0 to 1, 1 for like geometry.

    None where all tokens have the same features.
    """
    x, y = base.double(), tuned.double()
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) < x.shape[1]:
        k, m = x @ x.T, y @ y.T
        both, first, second = (k * m).sum(), (k * k).sum(), (m * m).sum()
    else:
        both, first, second = ((a.T @ b).square().sum() for a, b in ((x, y), (x, x), (y, y)))
    scale = float(first * second) ** 0.5
    return float(both) / scale if scale else None
