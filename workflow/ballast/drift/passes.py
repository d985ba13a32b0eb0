"""A pass of a model over texts, that keeps what its layers give and what its linears read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ballast.experts import Experts
from ballast.models import Base

MEMORY = 256 * 2**20


def spread(count: int, most: int) -> Tensor:
    """At most `most` (at least one) of the numbers below `count`, evenly spread, ascending."""
    most = min(count, max(1, most))
    return torch.arange(most) * count // max(1, most)


def parted(chosen: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Numbers that were chosen of a total, parted into those of its parts, counted from each."""
    found, start = [], 0
    for count in counts:
        found.append(chosen[(chosen >= start) & (chosen < start + count)] - start)
        start += count
    return found


class Pass:
    """One pass of a model over batches, with hooks that keep what they are told to."""

    def __init__(self, base: Base, made: Sequence[dict[str, Tensor]]) -> None:
        self.base, self.batches = base, made
        self.counts = [int(batch["attention_mask"].sum()) for batch in made]
        self.kept: list[dict[str, Tensor]] = []
        self.handles: list[RemovableHandle] = []
        self.mask = torch.empty(0)
        self._last: tuple[object, object, Tensor] = (None, None, torch.empty(0))

    def __enter__(self) -> Pass:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def watch_layers(self) -> None:
        """Keep what every layer gives, [tokens, width]."""
        model = self.base.model
        names = self.base.anatomy.layer_names(model)
        width = model.config.get_text_config().hidden_size
        most = MEMORY // (len(names) * width * model.dtype.itemsize)
        parts = parted(spread(sum(self.counts), most), self.counts)
        for name in names:

            def hook(_: nn.Module, __: object, out: object, name: str = name) -> None:
                # The last call counts: a soft prompt may have gone through the layers before.
                self.kept[-1].pop(name, None)
                self._keep(name, out[0] if isinstance(out, tuple) else out, parts)

            self.handles.append(model.get_submodule(name).register_forward_hook(hook))

    def watch_linears(self, names: Sequence[str], tokens: Tensor) -> None:
        """Keep what every linear reads, [tokens, in]."""
        parts = parted(tokens, self.counts)
        for name in names:

            def hook(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                self._keep(name, args[0], parts)

            self.handles.append(self.base.model.get_submodule(name).register_forward_pre_hook(hook))

    def logs(self, places: Sequence[tuple[Tensor, ...]]) -> Iterator[Tensor]:
        """Log-probabilities [places, V] of each batch, in float32."""
        model = self.base.model
        options = {} if self.base.anatomy.encoder else {"use_cache": False}
        for batch in self.batches:
            self.mask = batch["attention_mask"]
            self.kept.append({})
            inputs = {k: v.to(model.device) for k, v in batch.items() if k != "scored"}
            logits = model(**inputs, **options).logits
            rows, positions = (index.to(logits.device) for index in places[len(self.kept) - 1])
            yield logits[rows, positions].float().log_softmax(-1).cpu()

    def joined(self, names: Sequence[str]) -> dict[str, Tensor]:
        """What was kept under names that the model ran, of all batches, in the order of running."""
        wanted, made, found = set(names), {}, {}
        for name in self.kept[0] if self.kept else ():
            if name in wanted:
                parts = [kept[name] for kept in self.kept]
                same = tuple(id(part) for part in parts)
                if same not in made:
                    made[same] = torch.cat(parts)
                found[name] = made[same]
        return found

    def _keep(self, name: str, values: Tensor, parts: Sequence[Tensor]) -> None:
        """Keep chosen rows of values [rows, tokens, width] of this batch, on the CPU.

        Where its tokens are not the text's (those of images), as many, evenly. The first call of a
        module counts (DeBERTa's have others, for places); linears share what they read alike.
        """
        if name in self.kept[-1]:
            return
        if self._last[0] is not values or self._last[1] is not parts:
            chosen = parts[len(self.kept) - 1]
            rows = values.flatten(0, -2)
            if values.shape[:-1] == self.mask.shape:
                places = self.mask.flatten().nonzero()[:, 0][chosen]
            else:
                places = spread(len(rows), len(chosen))
            self._last = values, parts, rows[places.to(rows.device)].cpu()
        self.kept[-1][name] = self._last[2]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; modes, random numbers and what experts report to as before, after."""
    modes = {module: module.training for module in model.modules()}
    watched = {m: m.watch for m in model.modules() if isinstance(m, Experts)}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model.eval()
        for module in watched:
            module.watch = None
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module, watch in watched.items():
                module.watch = watch
