"""Sparse training: masks on parameters that train in full, and sparse updates of frozen matrices.

Two ways to train few entries of many. *Masked*: the parameter itself trains, with a dense gradient
and a dense optimiser, and a mask says which entries may move (FISH, GPS, magnitude masks). *Sparse
update*: the parameter is frozen and a vector of values at fixed places is added to it (SpA, RoSA,
DSEE), so that the optimiser holds the values alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ballast.adapters import adapter_dtype
from ballast.context import Context
from ballast.errors import SuiteError
from ballast.selective import copies

# Says on first use, on every machine, that its interface may change; its results are tested here.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

MASK = "mask."

# Choosing entries.


def largest(scores: Tensor, count: int) -> Tensor:
    """Mask of the shape of `scores`, True at its `count` largest entries (ties: any of them)."""
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().topk(count).indices] = True
    return mask.view(scores.shape)


def largest_overall(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Masks of the `count` entries that are largest among all tensors."""
    chosen = largest(torch.cat([score.flatten() for score in scores.values()]), count)
    parts = chosen.split([score.numel() for score in scores.values()])
    return {
        name: part.view(score.shape)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


# Masks on what trains: on the gradient and on the update.


def keep_only(ctx: Context, masks: Mapping[str, Tensor]) -> None:
    """Let only the True entries of the method's parameters move; stored as bits."""
    for name, mask in masks.items():
        ctx.state[MASK + name] = torch.from_numpy(np.packbits(mask.flatten().cpu().numpy()))
    restore_masks(ctx)


def restore_masks(ctx: Context) -> None:
    """Unpack the stored masks into ctx.scratch."""
    masks = {}
    for name, p in ctx.own().items():
        bits = np.unpackbits(ctx.state[MASK + name].cpu().numpy(), count=p.numel())
        masks[name] = torch.from_numpy(bits.astype(bool)).to(p.device).view(p.shape)
    ctx.scratch["masks"] = masks


def start_of(ctx: Context) -> None:
    """Keep theta0, which masked entries are held at. For `attach`, when everything is chosen."""
    ctx.scratch["start"] = copies(ctx)


def mask_gradients(ctx: Context) -> None:
    """Zero masked gradients, so that they count in neither Adam's moments nor the clipped norm."""
    for name, p in ctx.own().items():
        if p.grad is not None:
            p.grad.mul_(ctx.scratch["masks"][name])


@torch.no_grad()
def hold_masked(ctx: Context) -> None:
    """Put masked entries back, whatever moved them: decay, or an optimiser with momentum."""
    masks, start = ctx.scratch["masks"], ctx.scratch["start"]
    for name, p in ctx.own().items():
        p.copy_(torch.where(masks[name], p, start[name]))


def without_decay(ctx: Context) -> list[dict[str, Any]]:
    """One group without weight decay: decay moves entries that have no gradient."""
    return [{"params": list(ctx.own()), "weight_decay": 0.0}]


def kept(ctx: Context) -> int:
    """How many entries may move."""
    return sum(int(mask.sum()) for mask in ctx.scratch["masks"].values())


def layer_parameters(ctx: Context) -> dict[str, nn.Parameter]:
    """Every parameter of the decoder layers, by name, trainable or not."""
    prefix = f"{ctx.anatomy.layers}."
    return {n: p for n, p in ctx.model.named_parameters() if n.startswith(prefix)}


# Scores from gradients.


def grouped(batches: Iterable[Mapping[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    """The examples of `batches` in batches of `size`, right-padded; the last may hold fewer."""
    held: list[dict[str, Tensor]] = []
    for batch in batches:
        for i in range(len(batch["labels"])):
            held.append({key: value[i : i + 1] for key, value in batch.items()})
            if len(held) == size:
                yield _stacked(held)
                held = []
    if held:
        yield _stacked(held)


def _stacked(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    stacked = {}
    for key in examples[0]:
        parts = [example[key] for example in examples]
        if parts[0].ndim == 2:  # [1, tokens]; images and labels of classes have equal shapes
            longest = max(part.shape[1] for part in parts)
            fill = -100 if key == "labels" else 0
            parts = [F.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts]
        stacked[key] = torch.cat(parts)
    return stacked


def gradient_scores(
    ctx: Context,
    weights: Mapping[str, Tensor],
    batches: Iterable[Mapping[str, Tensor]],
    of: Callable[[Tensor], Tensor] = torch.square,
    summed: bool = False,
) -> dict[str, Tensor]:
    """Mean over batches of `of`(gradient of the loss), for each weight, in at least fp32.

    The loss is the model's own, a mean over the answer's tokens; `summed`: their sum, which is
    - log p(answer). Dropout is off. Weights need not be trainable.
    Raises SuiteError if there are no batches.
    """
    total = {n: torch.zeros_like(w, dtype=adapter_dtype(w)) for n, w in weights.items()}
    frozen = [w for w in weights.values() if not w.requires_grad]
    was_training, count = ctx.model.training, 0
    half = any(p.dtype == torch.bfloat16 for p in ctx.model.parameters())
    ctx.model.eval()
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        for batch in batches:
            device = batch["labels"].device.type
            with torch.autocast(device, torch.bfloat16, enabled=half):
                loss = ctx.model(**batch).loss
            if summed:
                loss = loss * _scored(ctx, batch["labels"])
            grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, grad in zip(weights, grads, strict=True):
                if grad is not None:
                    total[name] += of(grad.to(total[name].dtype))
            count += 1
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        ctx.model.train(was_training)
    if not count:
        raise SuiteError("no training examples to score gradients on")
    return {name: score / count for name, score in total.items()}


def _scored(ctx: Context, labels: Tensor) -> Tensor | int:
    """How many positions the model's mean loss is over."""
    if labels.ndim == 1:
        return len(labels)
    return ((labels if ctx.anatomy.kind == "encoder" else labels[:, 1:]) != -100).sum()


# Sparse updates of a frozen matrix.


class SparseUpdate(nn.Module):
    """S [m, n] added to a frozen weight: `count` values that train at fixed places, in CSR.

    values [count] start at zero and exist from the beginning, so that the number that trains is
    known before the places are; until `place` the update is absent. Offsets [m + 1] and columns
    [count] are stored, int32 (peft-rosa's int16 columns end at width 32,767).

    kernel: how the values' gradients come from dY and X. "sampled" computes the `count` products
    alone; "dense" forms dY^T X [m, n] and reads them from it. Both are exact.
    """

    def __init__(
        self, weight: Tensor, count: int, scale: float = 1.0, kernel: str = "sampled"
    ) -> None:
        super().__init__()
        rows, columns = weight.shape
        kind = {"dtype": torch.int32, "device": weight.device}
        self.shape, self.scale, self.kernel = (rows, columns), scale, kernel
        self.values = nn.Parameter(
            torch.zeros(count, dtype=adapter_dtype(weight), device=weight.device)
        )
        self.register_buffer("offsets", torch.zeros(rows + 1, **kind))
        self.register_buffer("columns", torch.zeros(count, **kind))
        self.places: Tensor | None = None

    @torch.no_grad()
    def place(self, mask: Tensor) -> None:
        """Put the values where `mask` [m, n] is True, row by row; it has `count` such entries."""
        self.columns.copy_(mask.nonzero()[:, 1])
        self.offsets[1:] = mask.sum(1).cumsum(0)
        self.refresh()

    def refresh(self) -> None:
        """Rebuild the flat places [count] after offsets and columns were read back."""
        if self.offsets[-1] != len(self.columns):
            return
        rows = torch.arange(self.shape[0], device=self.columns.device)
        rows = rows.repeat_interleave((self.offsets[1:] - self.offsets[:-1]).long())
        self.places = rows * self.shape[1] + self.columns

    def added_to(self, weight: Tensor) -> Tensor:
        """weight + scale S in a new tensor; the sums are rounded to weight's precision once."""
        total = weight.detach().clone(memory_format=torch.contiguous_format)
        if self.places is not None:
            flat = total.view(-1)
            sums = flat[self.places].to(self.values.dtype) + self.scale * self.values.detach()
            flat.scatter_(0, self.places, sums.to(total.dtype))
        return total

    def linear(self, x: Tensor, base: nn.Linear) -> Tensor:
        """x (W0 + scale S)^T + bias for rows x [tokens, n]."""
        if self.places is None:
            return base(x)
        return _SparseLinear.apply(x, self.values, base.weight, base.bias, self)

    def gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """d loss / d values from dY [tokens, m] and X [tokens, n]."""
        grad, x = grad.to(self.values.dtype), x.to(self.values.dtype)
        if self.kernel == "dense":
            found = (grad.T @ x).view(-1)[self.places]
        else:
            pattern = torch.sparse_csr_tensor(
                self.offsets,
                self.columns,
                torch.zeros_like(self.values),
                self.shape,
                check_invariants=False,
            )
            found = torch.sparse.sampled_addmm(pattern, grad.T, x, beta=0.0).values()
        return self.scale * found


class _SparseLinear(torch.autograd.Function):
    """Holds x for the backward pass and no [m, n]: autograd would keep W0 + S of every layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None, update: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.update = update
        return F.linear(x, update.added_to(weight), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dv = None
        if ctx.needs_input_grad[0]:
            dx = (grad @ ctx.update.added_to(weight).to(grad.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dv = ctx.update.gradient(grad, x)
        return dx, dv, None, None, None


def sparse_parts(ctx: Context) -> dict[str, SparseUpdate]:
    """The sparse updates of the adapted modules, by module name."""
    return {name: layer.sparse for name, layer in ctx.adapters()}


def place_largest(ctx: Context, scores: Mapping[str, Tensor]) -> None:
    """Place every matrix's values at its own largest scores."""
    for name, sparse in sparse_parts(ctx).items():
        sparse.place(largest(scores[name], len(sparse.values)))


def base_weights(ctx: Context) -> dict[str, Tensor]:
    """The frozen weight under every adapter, by module name."""
    return {name: layer.base.weight for name, layer in ctx.adapters()}


def refuse_embeddings(ctx: Context) -> None:
    """Raise SuiteError if a target is not a Linear: a sparse update is for matrices."""
    for name in ctx.targets:
        if not isinstance(ctx.model.get_submodule(name), nn.Linear):
            raise SuiteError(f"modules: {name} is an embedding; this method is for linear modules")
