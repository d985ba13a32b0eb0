"""What a method holds and stores on a base, by running it: a few real steps on the miniature base.

Every tensor's shape is then grown to the base's widths and the cell's rank, each dimension by the
power of them that two miniatures of different widths, or ranks, show.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ballast.decompositions import Decompositions
from ballast.forecast.holding import Footprint
from ballast.forecast.miniature import model_of, scale_of, shrunk

# Of a miniature's run: enough for what methods make after their first step. No width is this prime
# number of tokens, or twice that.
STEPS, ROWS, TOKENS = 2, 2, 13
IMAGE_TOKENS, MARKER = 2, 1
# Smaller tensors than this count for nothing while a method starts.
LEAST_BYTES = 256
# The largest rank of a miniature; a larger one is grown to.
RANK = 16
# A miniature that is too narrow for a method's settings is made this much wider, once.
WIDER = 4

Shape = tuple[tuple[int, ...], int]  # dimensions, and bytes of a number


@dataclass
class Run:
    """Shapes of a miniature's tensors, and those of the weights that it decomposed."""

    held: list[Shape]
    stored: list[Shape]
    beside: list[Shape]
    kept: list[Shape]
    start: int  # the most bytes that were held while the method started
    decomposed: list[tuple[int, ...]]


class Asked(Decompositions):
    """Decompositions of zeros, that note whose they were."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[int, tuple[int, ...]] = {}

    def svd(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, columns = weight.shape
        self.shapes[weight.data_ptr()] = (rows, columns)
        least = min(rows, columns)
        return torch.zeros(rows, least), torch.zeros(least), torch.zeros(least, columns)


class Live(TorchDispatchMode):
    """The most bytes that tensors hold at once beyond a model's own; small ones do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.most = 0
        for parameter in model.parameters():
            self._add(parameter.untyped_storage())
        self.before = self.now

    @property
    def more(self) -> int:
        return self.most - self.before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else (made,):
            if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        size, place = storage.nbytes(), storage.data_ptr()
        if size < LEAST_BYTES or (place in self.held and not self.held[place][0].expired()):
            return
        self.now += size - self.held.get(place, (None, 0))[1]
        self.held[place] = StorageWeakRef(storage), size
        if self.now > self.most:
            self.held = {p: kept for p, kept in self.held.items() if not kept[0].expired()}
            self.now = sum(size for _, size in self.held.values())
            self.most = max(self.most, self.now)


class Kept:
    """What the last step's graph holds for its backward pass, beside parameters; each once."""

    def __init__(self, tuner: Any) -> None:
        self.ctx = tuner.ctx
        self.found: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        if self.ctx.step == STEPS - 1 and tensor.layout is torch.strided:
            # The tensor is held, so that its place in memory stays its own.
            self.found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    def shapes(self) -> list[Shape]:
        """Without the model's own tensors and the logits."""
        model = self.ctx.model
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        words = model.config.get_text_config().vocab_size
        return [
            _shape(tensor)
            for place, tensor in self.found.items()
            if place not in own and words not in tensor.shape
        ]


def footprint(config: dict[str, Any], spec: dict[str, Any], methods: Path) -> Footprint:
    """Of a cell's method on the base of a configuration; an equal budget is resolved already.

    Raises whatever the method raises on a base that does not suit it.
    """
    scale = scale_of(config)
    try:
        return _measured(config, spec, methods, scale)
    except Exception:
        if scale < 2 * WIDER:
            raise
        return _measured(config, spec, methods, scale // WIDER)


def _measured(config: dict[str, Any], spec: dict[str, Any], methods: Path, scale: int) -> Footprint:
    rank = spec["rank"]
    if scale == 1:
        return _sums(run(shrunk(config, 1), spec, methods, rank), [], 1)
    small = min(rank, RANK) if rank else rank
    wide = run(shrunk(config, scale // 2), spec, methods, small)
    others = [(run(shrunk(config, scale), spec, methods, small), scale / 2)]
    if rank and rank > RANK:
        low = run(shrunk(config, scale // 2), spec, methods, RANK // 2)
        others.append((low, rank / RANK))
    return _sums(wide, others, scale / 2)


def _sums(wide: Run, others: list[tuple[Run, float]], width: float) -> Footprint:
    """The footprint at `width` times the widths of `wide`; others: runs at half of something, and
    how many times that is to be taken.

    Raises ValueError where two runs hold other numbers of tensors.
    """

    def grown(part: str) -> list[tuple[float, Shape]]:
        shapes = getattr(wide, part)
        befores = [(getattr(other, part), factor) for other, factor in others]
        if any(len(before) != len(shapes) for before, _ in befores):
            raise ValueError(f"{part}: the number of tensors depends on the width")
        return [
            (numbers(shape, [(b[place][0], factor) for b, factor in befores]), shape)
            for place, shape in enumerate(shapes)
        ]

    def numbers(shape: Shape, befores: list[tuple[tuple[int, ...], float]]) -> float:
        total = 1.0
        for place, side in enumerate(shape[0]):
            total *= side
            for before, factor in befores:
                total *= grown_side(side, before[place], factor) / side if side else 1.0
        return total

    def total(part: str) -> float:
        return sum(count * size for count, (_, size) in grown(part))

    kept = grown("kept")
    rows = ROWS * TOKENS
    moving = sum(n * size for n, (dims, size) in kept if TOKENS in dims or rows in dims)
    shapes = [(m * width, n * width) for m, n in wide.decomposed]
    return Footprint(
        held=sum(count for count, _ in grown("held")),
        stored=total("stored"),
        tensors=len(wide.stored),
        beside=total("beside"),
        activations=moving / rows,
        copies=sum(count * size for count, (_, size) in kept) - moving,
        start=_grown_bytes(wide.start, others[0][0].start, width) if others else wide.start,
        decomposed=4 * sum((m + n + 1) * min(m, n) for m, n in shapes),
        # A singular value decomposition takes about 14 m n min(m, n) operations.
        decomposing=14 * sum(m * n * min(m, n) for m, n in shapes),
    )


def _grown_bytes(total: float, before: float, factor: float) -> float:
    """Bytes of vectors and matrices at `factor` times the widths, from those at one and at half."""
    matrices = min(total, max(0.0, 2 * total - 4 * before))
    if total > 2.8 * before:
        # Nearly all are matrices; the few tokens' activations weigh less and less.
        matrices = total
    return matrices * factor**2 + (total - matrices) * factor


def grown_side(side: int, before: int, factor: float) -> float:
    """A dimension at `factor` times the width, from that at one and (`before`) at half of it.

    >>> [grown_side(*sides, 10) for sides in ((8, 8), (8, 4), (33, 17), (64, 16), (12, 8))]
    [8, 80, 330, 6400, 84]
    """
    if side == before or not before:
        return side
    power = math.log2(side / before)
    # Counts that were rounded down to a whole number grow a little faster than what they count.
    whole = 2 if power > 1.5 else round(power)
    if whole and abs(power - whole) < (0.6 if whole == 2 else 0.1):
        return side * factor**whole
    return side + 2 * max(0, side - before) * (factor - 1)


def run(config: dict[str, Any], spec: dict[str, Any], methods: Path, rank: int | None) -> Run:
    """Train a method for some steps on the model of a configuration, and look at what it has."""
    from ballast.models import DTYPES
    from ballast.training import Trainer

    torch.manual_seed(0)
    model = model_of(config).to(DTYPES[spec["training"]["precision"]]).requires_grad_(False)
    use_features(model)
    cache = Asked()
    tuner = tuner_on(model, spec, methods, rank, cache)
    settings = spec["training"] | {
        "steps": STEPS, "batch_size": ROWS, "accumulation": 1, "gradient_checkpointing": False,
    }  # fmt: skip
    trainer, kept = Trainer(tuner, _examples(model, spec), settings, seed=0), Kept(tuner)
    with Live(model) as live:
        trainer.prepare()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        trainer.run()
    head = {n: p for n, p in model.named_parameters() if n.startswith("class_head.")}
    held = tuner.ctx.trainable() | head
    return Run(
        held=[_shape(p) for p in held.values()],
        stored=[_shape(tensor) for tensor in tuner.tensors().values()],
        beside=list(_beside(tuner.ctx)),
        kept=kept.shapes(),
        start=live.more,
        decomposed=list(cache.shapes.values()),
    )


def tuner_on(
    model: nn.Module, spec: dict[str, Any], methods: Path, rank: int | None, cache: Decompositions
) -> Any:
    """A cell's method on a model, not started yet."""
    from ballast.encoders import HeadTuner, add_head
    from ballast.tuner import Tuner, load_method

    method = load_method(methods / f"{spec['method']}.py")
    if "classes" in spec:
        add_head(model, dict(spec["classes"]), 0)
    context = context_on(model, method, spec, cache)
    context.rank, context.total_steps = rank, STEPS
    if "classes" in spec:
        return HeadTuner(method, context, spec["training"]["head_learning_rate"])
    return Tuner(method, context)


def context_on(model: nn.Module, method: Any, spec: dict[str, Any], cache: Decompositions) -> Any:
    """A cell's context on a model that is no loaded base."""
    from ballast.anatomy import anatomy_of, targets_of
    from ballast.context import Context

    hyper = getattr(method, "Hyper", None)
    return Context(
        model=model,
        anatomy=anatomy_of(model),
        hyper=hyper(**copy.deepcopy(spec["hyper"])) if hyper else None,
        rank=spec["rank"],
        targets=targets_of(model, spec["modules"], spec["connector"]),
        generator=torch.Generator().manual_seed(0),
        cache=cache,
        total_steps=spec["training"]["steps"],
        learning_rate=spec["learning_rate"],
        connector=spec["connector"],
        tasks=tuple(spec.get("mixture", [spec["target"]])),
        response_marker=(MARKER,),
    )


def use_features(model: nn.Module) -> None:
    """Let a vision-language model read features for images, as cells do, if it is one."""
    from types import SimpleNamespace

    from ballast.anatomy import anatomy_of
    from ballast.models import use_stored_features

    anatomy = anatomy_of(model)
    if anatomy.tower is not None:
        use_stored_features(SimpleNamespace(model=model, anatomy=anatomy))


def _examples(model: nn.Module, spec: dict[str, Any]) -> Any:
    """Random texts, half of them response, of every task of the target; each with its image."""
    from ballast.training import Examples

    tasks = spec.get("mixture", [spec["target"]])
    count, words = ROWS * STEPS, model.config.get_text_config().vocab_size
    # The last word stands for images.
    ids = np.random.default_rng(0).integers(2, words - 1, (count, TOKENS))
    ids[:, TOKENS // 2 - 1] = MARKER
    features = None
    if hasattr(model.config, "vision_config"):
        ids[:, :IMAGE_TOKENS] = model.config.image_token_id
        features = torch.randn(count, IMAGE_TOKENS, model.config.vision_config.hidden_size)
    return Examples(
        input_ids=list(ids),
        prompt_lengths=[TOKENS // 2] * count,
        pad=0,
        classes=[0] * count if "classes" in spec else None,
        tasks=[tasks[i % len(tasks)] for i in range(count)],
        images=None if features is None else list(range(count)),
        features=None if features is None else features.to(model.dtype),
    )


def _shape(tensor: Tensor) -> Shape:
    return tuple(tensor.shape), tensor.element_size()


def _beside(ctx: Any) -> Iterator[Shape]:
    """What the method keeps beside the base's weights and what trains, each storage once."""
    seen = {p.untyped_storage().data_ptr() for p in ctx.model.parameters()}
    buffers = {
        f"{name}.{k}": b for name, a in ctx.adapters() for k, b in a.named_buffers()
        if not k.startswith("base.")
    }  # fmt: skip
    for tensor in _tensors([ctx.state, ctx.scratch, buffers]):
        place = tensor.untyped_storage().data_ptr()
        if place not in seen:
            seen.add(place)
            yield _shape(tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested dictionaries, lists and tuples."""
    if isinstance(value, Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
