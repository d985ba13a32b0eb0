"""Full-ST: every decoder layer trains in full.

    theta <- theta - eta grad L,   theta = all parameters of all decoder layers

Embeddings, final norm and head stay frozen, as does the vision tower; the connector trains where
the variant says "tuned". Trainable: all parameters of the decoder layers.
"""

from __future__ import annotations

from ballast.context import Context
from ballast.declare import Declaration
from ballast.selective import tune_all

declaration = Declaration(
    title="Full-ST",
    citation="Huang et al., Keeping Yourself is Important in Downstream Tuning Multimodal Large "
    "Language Model, 2025, arXiv:2503.04543",
    family="selective",
    merges=True,
    learning_rate=2e-5,
    learning_rate_source="full fine-tuning in PiSSA's protocol (arXiv:2404.02948, Table 2); the "
    "survey's own was not available",
)


def attach(ctx: Context) -> None:
    tune_all(ctx)


def report(ctx: Context) -> dict[str, float]:
    return {"tuned_layers": len(ctx.anatomy.layer_names(ctx.model))}
