"""MoE-LoRA: experts with their own A_i and B_i, mixed per token by a router (LoRAMoE, MoELoRA).

    y = W0 x + s sum_i softmax(R x)_i B_i A_i x,   A_i [r / N, n], B_i [m, r / N], R [N, n]

The rank r is the total, which the N experts split (CoIN's MoELoRA: 128 among 8); s = alpha / r.
LoRAMoE gives its rank per expert (4 each), adapts the feed-forward layers only (`ffn_only`), and
adds the balance loss

    L = L_task + balance sum_layers var(Q) / mean(Q)^2,   Q [examples, N] = sum_tokens softmax(R x)

over all entries of Q, padding included, as in its code. Its localised form multiplies Q by 1 + d or
1 - d according to whether an expert belongs to the kind of task of the example, for which nobody
has labelled the examples here: d = 0, as in the released script, which also has balance = 0.
A and R start uniform as in LoRAMoE (CoIN: A normal, sigma 0.01), B at zero. The update depends on
the input, so it cannot be merged. LoRAMoE's dropout 0.05 is 0 here as in LoRA. Trainable per
matrix: r (m + n) + N n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.experts import attach_experts, expert_parameters

from .interaction_lora import after_backward, initialise, penalty, report  # noqa: F401

declaration = Declaration(
    title="MoE-LoRA",
    citation="Dou et al., LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models "
    "via MoE-Style Plugin, ACL 2024, arXiv:2312.09979; Chen et al., CoIN: A Benchmark of Continual "
    "Instruction Tuning for Multimodal Large Language Models, NeurIPS 2024, arXiv:2403.08350",
    family="reparameterization",
    rank="total inner dimension r, split evenly among the experts",
    merges=False,
    random_start=True,
    learning_rate=2e-4,
    learning_rate_source="the released scripts of LoRAMoE (LLaMA-2-7B) and CoIN (LLaVA-1.5-7B)",
)

FEED_FORWARD = ("gate", "up", "down")


@dataclass(frozen=True)
class Hyper:
    experts: int = hyper(8, "LoRAMoE's and CoIN's scripts", low=1)
    alpha_over_r: float = hyper(2.0, "r 128, alpha 256 (CoIN); LoRAMoE's script has 8", low=0.0)
    dropout: float = hyper(0.0, "that of LoRA here; LoRAMoE's script has 0.05", low=0.0, high=0.99)
    balance: float = hyper(0.0, "blc_weight, off in LoRAMoE's script", low=0.0)
    ffn_only: bool = hyper(False, "CoIN adapts every linear module; true is LoRAMoE's choice")


def attach(ctx: Context) -> None:
    targets = _chosen(ctx)
    if not targets:
        raise SuiteError("ffn_only: no feed-forward module is among the modules to adapt")
    attach_experts(ctx, ctx.hyper.experts, targets, shared=False)


def total_parameters(ctx: Context, rank: int) -> int:
    experts = ctx.hyper.experts
    return expert_parameters(ctx, _chosen(ctx), rank // experts, experts, shared=False)


def allowed_sizes(ctx: Context) -> Sequence[int]:
    """Ranks that the experts can split evenly."""
    limit = min(min(ctx.model.get_submodule(name).weight.shape) for name in _chosen(ctx))
    return range(ctx.hyper.experts, limit + 1, ctx.hyper.experts)


def _chosen(ctx: Context) -> list[str]:
    """The targets, or those of them in feed-forward layers; a connector's stay."""
    if not ctx.hyper.ffn_only:
        return list(ctx.targets)
    return [
        name
        for name in ctx.targets
        if ctx.in_connector(name) or ctx.anatomy.role(name) in FEED_FORWARD
    ]
