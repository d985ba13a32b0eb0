"""FISH mask: only the entries with the largest Fisher information train.

    F = 1/N sum_i (d log p(y_i | x_i) / d theta)^2   over N training examples
    train theta_j only where F_j is among the keep_ratio largest of all

F is the empirical Fisher diagonal with the true labels, one backward pass *per example* (squares
of a batch's gradient would be another quantity), log p summed over the answer's tokens. The paper
ranks all parameters and adds a classifier that always trains; here the candidates are the decoder
layers, as in Full-ST, and there is no classifier.

The mask is applied twice: to the gradients, so that masked entries count neither in Adam's moments
nor in the norm that is clipped, and to the update, so that nothing else (weight decay, an optimiser
with momentum) moves them. Trained: keep_ratio x the parameters of the decoder layers.

Small bases: the paper's 0.5 % are 1,661 entries of micro-lm, and in 200 steps they learn the form
of the answers (12.2 to 2.7 nats per token, 3 % exact; rates 0.0009 to 0.027). `gradient_mask` with
scope tensor, 10 % of the entries, solves the same task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.selective import tune_all
from ballast.sparse import (
    gradient_scores,
    grouped,
    hold_masked,
    keep_only,
    kept,
    largest_overall,
    layer_parameters,
    mask_gradients,
    restore_masks,
    start_of,
    without_decay,
)

declaration = Declaration(
    title="FISH mask",
    citation="Sung, Nair and Raffel, Training Neural Networks with Fixed Sparse Masks, "
    "NeurIPS 2021, arXiv:2111.09839",
    family="selective",
    merges=True,
    learning_rate=5e-5,
    learning_rate_source="the paper's, for BERT-large on GLUE",
)


@dataclass(frozen=True)
class Hyper:
    keep_ratio: float = hyper(0.005, "0.5 % of the parameters (paper)", low=0.0, high=1.0)
    examples: int = hyper(1024, "N (paper)", low=1)


def attach(ctx: Context) -> None:
    tune_all(ctx)
    start_of(ctx)


def calibrate(ctx: Context) -> None:
    single = grouped(ctx.batches(ctx.hyper.examples), 1)
    fisher = gradient_scores(ctx, ctx.own(), single, summed=True)
    count = sum(score.numel() for score in fisher.values())
    keep_only(ctx, largest_overall(fisher, _count(ctx, count)))


def restored(ctx: Context) -> None:
    restore_masks(ctx)


def parameter_groups(ctx: Context) -> list[dict[str, Any]]:
    return without_decay(ctx)


def after_backward(ctx: Context) -> None:
    mask_gradients(ctx)


def after_step(ctx: Context) -> None:
    hold_masked(ctx)


def trained_count(ctx: Context) -> int:
    return kept(ctx)


def total_parameters(ctx: Context, size: int | None = None) -> int:
    return _count(ctx, sum(p.numel() for p in layer_parameters(ctx).values()))


def _count(ctx: Context, candidates: int) -> int:
    return max(1, int(candidates * ctx.hyper.keep_ratio))
