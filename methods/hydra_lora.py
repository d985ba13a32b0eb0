"""HydraLoRA: one A for what the data have in common, several B_i for what they do not.

    y = W0 x + s sum_i softmax(R x)_i B_i A x,   A [r, n], B_i [m, r], R [N, n], s = alpha / r

The layer is that of `interaction_lora`, which took it over; here are its own numbers. The paper
finds the number of heads by clustering the training data, the released script sets four. Its
vision-language variant has one router per MLP, three heads at s = 2, and another balance term
(mean weight times share of first choices, weight 0.05); the balance option here is the squared
coefficient of variation that the released layer computes (see `moe_lora`), off as in its script.
The script's dropout 0.05 is 0 here as in LoRA. Trainable per matrix: r n + N r m + N n.
"""

from __future__ import annotations

from dataclasses import dataclass

from ballast.declare import Declaration, hyper

from .interaction_lora import (  # noqa: F401
    after_backward,
    attach,
    initialise,
    penalty,
    report,
    total_parameters,
)

declaration = Declaration(
    title="HydraLoRA",
    citation="Tian et al., HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning, "
    "NeurIPS 2024, arXiv:2404.19245",
    family="reparameterization",
    rank="inner dimension r of the shared A and of every B_i",
    merges=False,
    random_start=True,
    learning_rate=2e-4,
    learning_rate_source="the released script for LLaMA-2-7B",
)


@dataclass(frozen=True)
class Hyper:
    heads: int = hyper(4, "lora_b_nums of the released script", low=1)
    alpha_over_r: float = hyper(8.0, "r 4, alpha 32 (released script)", low=0.0)
    dropout: float = hyper(
        0.0, "that of LoRA here; the released script has 0.05", low=0.0, high=0.99
    )
    balance: float = hyper(0.0, "blc_weight, off in the released script", low=0.0)
