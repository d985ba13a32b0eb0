"""LoRA+: LoRA whose B learns faster than its A.

    eta_A = eta,   eta_B = ratio * eta

An adapted embedding has a small rate of its own in the reference code and in PEFT, for both of its
factors (there A is the zero factor), which is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ballast.context import Context
from ballast.declare import Declaration, hyper

from .lora import attach, initialise, parameter_count  # noqa: F401

declaration = Declaration(
    title="LoRA+",
    citation="Hayou, Ghosh and Yu, LoRA+: Efficient Low Rank Adaptation of Large Models, ICML "
    "2024, arXiv:2402.12354",
    family="reparameterization",
    rank="inner dimension r of B A",
    merges=True,
    random_start=True,
    learning_rate=1e-4,
    learning_rate_source="half of LoRA's, as the authors advise (PEFT's create_loraplus_optimizer)",
)


@dataclass(frozen=True)
class Hyper:
    alpha_over_r: float = hyper(2.0, "that of LoRA here", low=0.0)
    dropout: float = hyper(0.0, "loralib's default", low=0.0, high=0.99)
    ratio: float = hyper(16.0, "2^4, the paper's recommendation", low=0.0)
    embedding_learning_rate: float = hyper(1e-6, "the reference code's default", low=0.0)


def parameter_groups(ctx: Context) -> list[dict[str, Any]]:
    a, b, embedding = [], [], []
    for name, layer in ctx.adapters():
        if layer.is_embedding:
            embedding += [f"{name}.A", f"{name}.B"]
        else:
            a.append(f"{name}.A")
            b.append(f"{name}.B")
    groups = [{"params": a}, {"params": b, "lr_scale": ctx.hyper.ratio}]
    if embedding:
        scale = ctx.hyper.embedding_learning_rate / ctx.learning_rate
        groups.append({"params": embedding, "lr_scale": scale})
    return groups
