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
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.selective import copies, tune_all

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
    ctx.scratch["start"] = copies(ctx)


def calibrate(ctx: Context) -> None:
    scores = _fisher(ctx)
    flat = torch.cat([score.flatten() for score in scores.values()])
    keep = max(1, int(flat.numel() * ctx.hyper.keep_ratio))
    chosen = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    chosen[flat.topk(keep).indices] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    for name, part in zip(scores, parts, strict=True):
        # Positions, not a mask: 0.5 % of the entries are 25 times smaller so.
        ctx.state[f"kept.{name}"] = part.nonzero().flatten()
    restored(ctx)


def restored(ctx: Context) -> None:
    masks = {}
    for name, p in ctx.own().items():
        mask = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
        mask[ctx.state[f"kept.{name}"].to(p.device)] = True
        masks[name] = mask.view(p.shape)
    ctx.scratch["masks"] = masks


def parameter_groups(ctx: Context) -> list[dict[str, Any]]:
    return [{"params": list(ctx.own()), "weight_decay": 0.0}]


def after_backward(ctx: Context) -> None:
    for name, p in ctx.own().items():
        if p.grad is not None:
            p.grad.mul_(ctx.scratch["masks"][name])


@torch.no_grad()
def after_step(ctx: Context) -> None:
    masks, start = ctx.scratch["masks"], ctx.scratch["start"]
    for name, p in ctx.own().items():
        p.copy_(torch.where(masks[name], p, start[name]))


def trained_count(ctx: Context) -> int:
    return sum(ctx.state[f"kept.{name}"].numel() for name in ctx.own())


def _fisher(ctx: Context) -> dict[str, Tensor]:
    """Mean squared gradient of each candidate, fp32, over single examples."""
    own = ctx.own()
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in own.items()}
    was_training, count = ctx.model.training, 0
    ctx.model.eval()
    for example in _examples(ctx):
        tokens = (example["labels"][:, 1:] != -100).sum()
        loss = ctx.model(**example).loss * tokens  # the model's loss is a mean over these
        grads = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        for name, grad in zip(own, grads, strict=True):
            if grad is not None:
                total[name] += grad.float().square()
        count += 1
    ctx.model.train(was_training)
    return {name: score / count for name, score in total.items()}


def _examples(ctx: Context) -> Iterator[dict[str, Tensor]]:
    assert ctx.batches is not None
    for batch in ctx.batches(ctx.hyper.examples):
        for i in range(len(batch["labels"])):
            yield {key: value[i : i + 1] for key, value in batch.items()}
