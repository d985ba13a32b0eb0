"""Model soup: the uniform average of several tuned models.

    theta = 1/T sum_t theta_t

Nothing is trained. The paper averages runs on one task with different settings, and keeps in its
*greedy* soup those that help on held-out data; here the parents are one run per target, and all
are kept, which is its *uniform* soup and the baseline of the papers on merging. One parent alone
is returned as it is.
"""

from __future__ import annotations

from torch import Tensor

from ballast.context import PostHoc
from ballast.declare import Declaration
from ballast.merging import changed_names, parents_of

declaration = Declaration(
    title="Model soup (uniform)",
    citation="Wortsman et al., Model Soups: Averaging Weights of Multiple Fine-Tuned Models "
    "Improves Accuracy without Increasing Inference Time, ICML 2022, arXiv:2203.05482",
    family="post-hoc",
    merges=True,
    unchanged_at_start=False,
    parents=("full_st",),
    several_targets=True,
)


def post_hoc(ctx: PostHoc) -> dict[str, Tensor]:
    return {
        name: parents_of(ctx, name).mean(0).to(ctx.base[name].dtype) for name in changed_names(ctx)
    }
