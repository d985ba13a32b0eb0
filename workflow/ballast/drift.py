"""How far a tuned model went from its base: in its predictions, its features and its weights.

Three calls, in the process of a cell:

    chosen = drift.texts(base, folders, entries, limit=2000, delimiter=" ")
    found = drift.reference(base, chosen)       # the base as it was loaded, nothing attached
    ...                                         # attach, train, merge; or put weights in place
    record["drift"] = drift.drift_of(found, base, model_folder, cache=None)

folders: {task: folder of its prepared data}; entries: {task: {"role": ...}}, as in a cell's spec;
delimiter: what stands between prompt and response; model_folder: where the base lies, whose
safetensors give W0; cache: `Decompositions` of the base, so that a matrix is decomposed once.
A vision-language base has its stored features in place (`models.use_stored_features`).

The formulas are those of `ballast.measures`. The model is left as it was: weights, gradients,
modes, hooks, and the state of random numbers.

Memory beyond the model, on the CPU: at most `MEMORY` each for log-probabilities (4 V bytes a
token), hidden states (b L d), and inputs and outputs of linears (b times the sum of their widths),
b being the bytes of a number; tokens that do not fit are left out evenly. For 7B in bf16 (V 32,000,
L 32, d 4096, inner width 11,008) a token takes 128 kB, 262 kB and 5.0 MB: 2,000, 1,024 and 53 fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ballast import measures
from ballast.adapters import Adapter
from ballast.decompositions import Decompositions
from ballast.experts import Experts
from ballast.generic import Texts, batches, texts
from ballast.models import Base
from ballast.stored import StoredWeights, fingerprint

__all__ = ["Reference", "Texts", "drift_of", "reference", "texts"]

INPUTS = 256
MEMORY = 256 * 2**20
# Multiply-adds of a cell's decompositions: all matrices of a small model, some of a large one.
WORK = 3e11
PREDICTIONS = ("kl", "kl_corrected", "forgetting_loss")
WEIGHTS = ("weight_change", "changed_share", "density", "effective_rank", "top_share")

Drift = dict[str, float | None]


@dataclass
class Reference:
    """What is kept of an untouched base; all tensors are on the CPU.

    batches: the texts as inputs; places: which predictions of a batch are compared, [rows,
    positions]; logs: their log-probabilities [places, V]; hidden: features [tokens, width] behind
    each layer; inputs [tokens, in] and outputs [tokens, out] of the linears, in the order in which
    the model runs them; marks: fingerprints of weights, by which W0 is found on the disk.
    """

    batches: list[dict[str, Tensor]]
    places: list[tuple[Tensor, ...]]
    logs: list[Tensor]
    hidden: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    marks: dict[str, Tensor]


@torch.no_grad()
def reference(base: Base, texts: Texts) -> Reference:
    """Run the texts through an untouched base and keep what `drift_of` compares with."""
    made = batches(base, texts)
    places = _places(base, made)
    linears = _linears(base)
    most = min(INPUTS, MEMORY // _linear_bytes(base, linears))
    with _untouched(base.model), _Run(base, made) as run:
        run.watch_layers()
        run.watch_linears(linears, _chosen(texts.tokens, most))
        logs = list(run.logs(places))
        inputs = run.joined(linears)
        outputs = {name: _output(base, name, x) for name, x in inputs.items()}
        hidden = run.joined(base.anatomy.layer_names(base.model))
    weights = {name: base.model.get_submodule(name).weight for name in _matrices(base)}
    marks = {name: fingerprint(weight) for name, weight in weights.items()}
    return Reference(made, places, logs, hidden, inputs, outputs, marks)


@torch.no_grad()
def drift_of(
    reference: Reference, base: Base, model_folder: Path, *, cache: Decompositions | None = None
) -> Drift:
    """How far the model went, by names of `measures.MEASURES`.

    None stands where there is no such quantity: those of weights in a model that carries adapters,
    the change of activations where what is attached lies outside the linears.
    Raises DataError if the base in `model_folder` is not the one of the reference.
    """
    with _untouched(base.model):
        found = _predictions(reference, base)
        found["activation_change"] = _activations(reference, base)
        if any(_attached(module) for module in base.model.modules()):
            found |= dict.fromkeys(WEIGHTS)
        else:
            found |= _weights(reference, base, StoredWeights(Path(model_folder)), cache)
    return {k: v if v is not None and math.isfinite(v) else None for k, v in found.items()}


def _predictions(reference: Reference, base: Base) -> Drift:
    """KL, MiLoRA's loss and its entropy-corrected form, and CKA of the features."""
    totals, count = dict.fromkeys(PREDICTIONS, 0.0), 0
    with _Run(base, reference.batches) as run:
        run.watch_layers()
        for before, after in zip(reference.logs, run.logs(reference.places), strict=True):
            # Some tokens at a time: a large vocabulary in float64 is large.
            for old, new in zip(before.split(64), after.split(64), strict=True):
                for name in PREDICTIONS:
                    totals[name] += measures.MEASURES[name].function(old, new) * len(old)
                count += len(old)
        hidden = run.joined(list(reference.hidden))
    found = {name: total / count if count else None for name, total in totals.items()}
    alike = [measures.cka(x, hidden[name]) for name, x in reference.hidden.items()]
    return {**found, "cka": measures.mean(alike), "tokens": float(count)}


def _activations(reference: Reference, base: Base) -> float | None:
    """Mean over the linears of the relative change that each makes on the base's own inputs."""
    inside = {
        id(part)
        for name in reference.inputs
        for part in base.model.get_submodule(name).modules()
        if _attached(part)
    }
    attached = {id(module) for module in base.model.modules() if _attached(module)}
    if attached and not inside:
        return None
    changes = []
    for name, x in reference.inputs.items():
        change = _output(base, name, x).double() - reference.outputs[name].double()
        changes.append(measures.activation_change(change, x))
    return measures.mean(changes)


def _weights(
    reference: Reference, base: Base, stored: StoredWeights, cache: Decompositions | None
) -> Drift:
    """What became of the matrices: those of linears, and of the embedding if it changed."""
    ratios, moved, entries, changed = [], 0, 0, []
    for name in reference.marks:
        delta, before = _change(reference, base, stored, name)
        here = int(delta.count_nonzero())
        if here:
            changed.append(name)
            ratios.append(measures.weight_change(delta, before))
            moved, entries = moved + here, entries + delta.numel()
    found: Drift = {
        "weight_change": measures.mean(ratios) or 0.0,
        "changed_share": len(changed) / len(reference.marks),
        "density": moved / entries if entries else 0.0,
        "effective_rank": 0.0,
        "top_share": None,
    }
    return found | (_spectra(reference, base, stored, cache, changed) if changed else {})


def _spectra(
    reference: Reference,
    base: Base,
    stored: StoredWeights,
    cache: Decompositions | None,
    changed: Sequence[str],
) -> Drift:
    """Effective rank and share in the top space, of all changed matrices or an even sample."""
    shapes = [base.model.get_submodule(name).weight.shape for name in changed]
    work = sum(rows * columns * min(rows, columns) for rows, columns in shapes)
    chosen = _chosen(len(changed), max(1, int(len(changed) * min(1.0, WORK / work))))
    ranks, shares = [], []
    for name in (changed[place] for place in chosen.tolist()):
        delta, before = _change(reference, base, stored, name)
        ranks.append(measures.effective_rank(torch.linalg.svdvals(delta)))
        if cache is None:
            u, _, v = torch.linalg.svd(before, full_matrices=False)
        else:
            u, _, v = (part.to(delta) for part in cache.svd(before))
        k = measures.top_directions(*before.shape)
        shares.append(measures.top_share(delta, u[:, :k], v[:k].T))
    return {"effective_rank": measures.mean(ranks), "top_share": measures.mean(shares)}


def _change(
    reference: Reference, base: Base, stored: StoredWeights, name: str
) -> tuple[Tensor, Tensor]:
    """W - W0 and W0 of the module called `name`, in float32, of a float64 base in float64."""
    weight = base.model.get_submodule(name).weight
    before = stored.weight(f"{name}.weight", reference.marks[name], weight)
    if weight.dtype != torch.float64:
        weight, before = weight.float(), before.float()
    return weight - before, before


def _attached(module: nn.Module) -> bool:
    """Whether a module is of a method and not of the base: an adapter, ours or PEFT's."""
    return isinstance(module, Adapter) or type(module).__module__.split(".")[0] == "peft"


def _linears(base: Base) -> list[str]:
    """The linears that methods adapt: of the layers, and of the connector."""
    scopes = [base.anatomy.layers, *filter(None, [base.anatomy.connector])]
    return [name for scope in scopes for name in base.anatomy.linears(base.model, scope, None)]


def _matrices(base: Base) -> list[str]:
    return [*_linears(base), base.anatomy.embeddings]


def _output(base: Base, name: str, x: Tensor) -> Tensor:
    """What the module called `name` makes of inputs x [tokens, in], on the CPU."""
    return base.model.get_submodule(name)(x.to(base.model.device)[None])[0].cpu()


def _linear_bytes(base: Base, linears: Sequence[str]) -> int:
    """Bytes of one token's inputs and outputs of all linears."""
    modules = [base.model.get_submodule(name) for name in linears]
    return base.model.dtype.itemsize * sum(m.in_features + m.out_features for m in modules)


def _places(base: Base, made: Sequence[dict[str, Tensor]]) -> list[tuple[Tensor, ...]]:
    """Rows and positions of the predictions compared in each batch, as many as memory may hold."""
    vocabulary = base.model.config.get_text_config().vocab_size
    counts = [int(batch["scored"].sum()) for batch in made]
    chosen = _parts(_chosen(sum(counts), MEMORY // (4 * vocabulary)), counts)
    scored = [batch["scored"].nonzero(as_tuple=True) for batch in made]
    return [
        tuple(index[part] for index in places) for places, part in zip(scored, chosen, strict=True)
    ]


def _chosen(count: int, most: int) -> Tensor:
    """At most `most` (at least one) of the numbers below `count`, evenly spread, ascending."""
    most = min(count, max(1, most))
    return torch.arange(most) * count // max(1, most)


def _parts(chosen: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Numbers that were chosen of a total, parted into those of its parts, counted from each."""
    found, start = [], 0
    for count in counts:
        found.append(chosen[(chosen >= start) & (chosen < start + count)] - start)
        start += count
    return found


class _Run:
    """One pass of a model over batches, with hooks that keep what they are told to."""

    def __init__(self, base: Base, made: Sequence[dict[str, Tensor]]) -> None:
        self.base, self.batches = base, made
        self.counts = [int(batch["attention_mask"].sum()) for batch in made]
        self.kept: list[dict[str, Tensor]] = []
        self.handles: list[RemovableHandle] = []
        self.mask = torch.empty(0)
        self._last: tuple[object, object, Tensor] = (None, None, torch.empty(0))

    def __enter__(self) -> _Run:
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
        parts = _parts(_chosen(sum(self.counts), most), self.counts)
        for name in names:

            def hook(_: nn.Module, __: object, out: object, name: str = name) -> None:
                # The last call counts: a soft prompt may have gone through the layers before.
                self.kept[-1].pop(name, None)
                self._keep(name, out[0] if isinstance(out, tuple) else out, parts)

            self.handles.append(model.get_submodule(name).register_forward_hook(hook))

    def watch_linears(self, names: Sequence[str], tokens: Tensor) -> None:
        """Keep what every linear reads, [tokens, in]."""
        parts = _parts(tokens, self.counts)
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
                places = _chosen(len(rows), len(chosen))
            self._last = values, parts, rows[places.to(rows.device)].cpu()
        self.kept[-1][name] = self._last[2]


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
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
