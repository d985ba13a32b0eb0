"""RoSA: LoRA plus a sparse update whose places are chosen by the task's gradients.

    y = (W0 + S) x + s B A x,   ||S||_0 = int(d m n) per matrix,   S = 0 and B = 0 at the start

Warm-up: LoRA alone for wl steps; then, per matrix, the places with the largest score (SpA's: mean
squared, or mean, gradient of W over `gradients` batches) become S. `restart: true` is what the
released scripts do: the warmed-up LoRA is thrown away with its optimiser, and both parts train from
the base for the whole run. The warm-up is then a calibration (time of its own in the record, wl
batches of training data, a constant rate) and costs no step of the run. `restart: false` is the
paper's single run: the first wl steps train LoRA, which goes on, and S joins it.

wl = min(warmup, fraction x steps): the scripts' 64 steps would be half of a short run. The low-rank
part trains at the method's rate, S at `sparse_lr_scale` times it (7e-4 and 2e-4 in the scripts).
Heads and connector keep training when the mask is made (the released scheduler freezes them).
Indices are int32 (there int16). Trainable per matrix: r (m + n) + int(d m n).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from ballast.adapters import LowRank
from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.lowrank import attach_low_rank, start_kaiming, target_shapes
from ballast.sparse import SparseUpdate, grouped, place_largest, refuse_embeddings, sparse_parts

from .lora import initialise  # noqa: F401
from .spa import nonzeros, report, scores  # noqa: F401

declaration = Declaration(
    title="RoSA",
    citation="Nikdan et al., RoSA: Accurate Parameter-Efficient Fine-Tuning via Robust Adaptation, "
    "ICML 2024, arXiv:2401.04679",
    family="reparameterization",
    rank="inner dimension r of B A; the sparse part's size is its density",
    merges=True,
    random_start=True,
    learning_rate=7e-4,
    learning_rate_source="the released scripts, for the low-rank part",
)


@dataclass(frozen=True)
class Hyper:
    alpha_over_r: float = hyper(1.0, "alpha 16 with r 16 (released scripts)", low=0.0)
    dropout: float = hyper(0.0, "that of LoRA here; the scripts have 0.05", low=0.0, high=0.99)
    density: float = hyper(0.006, "d 0.6 % with r 16 (released scripts)", low=1e-6, high=1.0)
    sparse_lr_scale: float = hyper(2 / 7, "2e-4 beside 7e-4 (released scripts)", low=0.0)
    restart: bool = hyper(True, "what the released scripts do")
    warmup: int = hyper(64, "wl64 (released scripts)", low=0)
    fraction: float = hyper(
        0.1, "of the run at most, chosen here for short runs", low=0.0, high=1.0
    )
    score: str = hyper("mean_squared", "grad_acc_mode", choices=("mean_squared", "mean"))
    gradients: int = hyper(1, "spa_num_grads", low=1)
    batch: int = hyper(32, "examples per gradient and warm-up step (scripts)", low=1)
    kernel: str = hyper("sampled", "of the values' gradients", choices=("sampled", "dense"))


class Robust(LowRank):
    """y = (W0 + s_S S) x + s B A x on a Linear."""

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        *,
        count: int,
        sparse_scale: float = 1.0,
        kernel: str = "sampled",
    ) -> None:
        super().__init__(base, rank, scale, dropout)
        self.sparse = SparseUpdate(base.weight, count, sparse_scale, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the base's shape and precision."""
        rows = x.flatten(0, -2)
        y = self._add_low(self.sparse.linear(rows, self.base), rows)
        return y.view(*x.shape[:-1], y.shape[-1])

    def restored(self) -> None:
        super().restored()
        self.sparse.refresh()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return self.sparse.added_to(super().merged_weight())


def attach(ctx: Context) -> None:
    refuse_embeddings(ctx)
    for name, count in zip(ctx.targets, nonzeros(ctx), strict=True):
        layer = partial(Robust, count=count, kernel=ctx.hyper.kernel)
        attach_low_rank(ctx, ctx.hyper.alpha_over_r, ctx.hyper.dropout, layer, names=(name,))


def calibrate(ctx: Context) -> None:
    if not ctx.hyper.restart:
        return
    steps, size = warm_up_steps(ctx), ctx.hyper.batch
    wanted = (steps + ctx.hyper.gradients) * size
    batches = islice(_endless(ctx, wanted), steps + ctx.hyper.gradients)
    start_kaiming(ctx)
    _warm_up(ctx, islice(batches, steps))
    place_largest(ctx, scores(ctx, batches))


def after_step(ctx: Context) -> None:
    if not ctx.hyper.restart and ctx.step == max(1, warm_up_steps(ctx)):
        wanted = ctx.hyper.gradients * ctx.hyper.batch
        place_largest(ctx, scores(ctx, grouped(ctx.batches(wanted), ctx.hyper.batch)))


def warm_up_steps(ctx: Context) -> int:
    """wl: steps of LoRA alone before the places are chosen."""
    return min(ctx.hyper.warmup, round(ctx.hyper.fraction * ctx.total_steps))


def _endless(ctx: Context, examples: int) -> Iterator[dict[str, Tensor]]:
    """Batches of training examples, from the beginning again where there are too few."""
    return cycle(grouped(ctx.batches(examples), ctx.hyper.batch))


def _warm_up(ctx: Context, batches: Iterable[dict[str, Tensor]]) -> None:
    """Train LoRA alone; the run itself begins afterwards, from the base."""
    low = [p for _, layer in ctx.adapters() for p in (layer.A, layer.B)]
    optimiser = torch.optim.AdamW(low, lr=ctx.learning_rate, weight_decay=0.0)
    device = low[0].device
    half = any(p.dtype == torch.bfloat16 for p in ctx.model.parameters())
    was_training = ctx.model.training
    ctx.model.train()
    # Dropout inside the calibration must not shift that of the run.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss = ctx.model(**batch).loss
            gradients = torch.autograd.grad(loss, low)
            for parameter, gradient in zip(low, gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(low, 1.0)
            optimiser.step()
    for parameter in low:
        parameter.grad = None
    ctx.model.train(was_training)


def parameter_groups(ctx: Context) -> list[dict[str, Any]]:
    values = [f"{name}.sparse.values" for name in sparse_parts(ctx)]
    low = [name for name in ctx.own() if name not in set(values)]
    return [{"params": low}, {"params": values, "lr_scale": ctx.hyper.sparse_lr_scale}]


def total_parameters(ctx: Context, rank: int) -> int:
    return sum(rank * (m + n) for m, n in target_shapes(ctx)) + sum(nonzeros(ctx))
