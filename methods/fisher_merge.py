"""Fisher merging: the average of several tuned models, weighted per entry by Fisher information.

    theta = sum_t c_t F_t o theta_t / sum_t c_t F_t,   c_t = 1 / ||F_t||_2  (or 1)
    F_t = 1/N sum_i (d log p(y_i | x_i) / d theta)^2   at theta_t, N training examples of task t

F is the diagonal of the empirical Fisher matrix (the true answers; one backward pass per example;
log p summed over the answer's tokens, as in `fish`). The authors' code takes the expectation over
all labels of a classifier, which text has too many of. As there, each task's Fisher is divided by
its norm over the whole model, and the model of the cell's own target (its "target model") has at
least `floor`, so that entries that matter to no task stay there. The tasks have equal weights
(the paper searches them on held-out data). Measuring gradients is all that is done: nothing is
trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ballast.context import PostHoc
from ballast.declare import Declaration, hyper
from ballast.merging import changed_names
from ballast.sparse import gradient_scores

declaration = Declaration(
    title="Fisher merging",
    citation="Matena and Raffel, Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, "
    "arXiv:2111.09832",
    family="post-hoc",
    merges=True,
    unchanged_at_start=False,
    parents=("full_st",),
    several_targets=True,
)


@dataclass(frozen=True)
class Hyper:
    examples: int = hyper(4096, "N per task (the authors' script)", low=1)
    floor: float = hyper(1e-6, "least Fisher (the authors' code)", low=1e-30)
    favour_own: bool = hyper(True, "the floor is the own model's alone (the authors' code)")
    normalise: bool = hyper(True, "divide each Fisher by its norm (the authors' code)")


def post_hoc(ctx: PostHoc) -> dict[str, Tensor]:
    names = changed_names(ctx)
    above = {name: torch.zeros_like(ctx.base[name], dtype=torch.float64) for name in names}
    below = {name: torch.zeros_like(value) for name, value in above.items()}
    for parent, tuned in enumerate(ctx.tuned):
        fisher = fisher_of(ctx, parent, names)
        norm = _norm(fisher) if ctx.hyper.normalise else 1.0
        floor = ctx.hyper.floor if parent == ctx.own or not ctx.hyper.favour_own else 0.0
        for name, weight in fisher.items():
            weight = weight.clamp_min(floor) / norm
            above[name] += weight * tuned.get(name, ctx.base[name]).double()
            below[name] += weight
    return {name: (above[name] / below[name]).to(ctx.base[name].dtype) for name in names}


def fisher_of(ctx: PostHoc, parent: int, names: list[str]) -> dict[str, Tensor]:
    """F of a parent for these weights, float64 on the CPU, measured on its own training data."""
    assert ctx.examples is not None
    model = ctx.load(parent)
    weights = {name: model.get_parameter(name) for name in names}
    examples = ctx.examples(parent, ctx.hyper.examples)
    scores = gradient_scores(ctx, weights, examples, summed=True)
    return {name: score.double().cpu() for name, score in scores.items()}


def _norm(fisher: dict[str, Tensor]) -> float:
    """Euclidean norm over the whole model; 1 for a Fisher of zeros, which weighs nothing."""
    return float(sum(score.square().sum() for score in fisher.values())) ** 0.5 or 1.0
