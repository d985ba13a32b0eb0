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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ballast.adapters import Adapter
from ballast.decompositions import Decompositions
from ballast.drift import geometry
from ballast.drift.generic import Texts, batches, texts
from ballast.drift.passes import MEMORY, Pass, parted, spread, untouched
from ballast.drift.stored import StoredWeights, fingerprint
from ballast.files import key_of
from ballast.models import Base
from ballast.tensorfile import read_tensors, write_tensors

__all__ = [
    "Reference", "Texts", "drift_of", "read_reference", "reference", "texts", "write_reference",
]  # fmt: skip

INPUTS = 256
# Multiply-adds of a cell's decompositions: all matrices of a small model, a sample of a large one.
WORK = 1e12
PREDICTIONS = {
    "kl": geometry.kl,
    "kl_corrected": geometry.kl_corrected,
    "forgetting_loss": geometry.forgetting_loss,
}
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
    with untouched(base.model), Pass(base, made) as run:
        run.watch_layers()
        run.watch_linears(linears, spread(texts.tokens, most))
        logs = list(run.logs(places))
        inputs = run.joined(linears)
        outputs = {name: _output(base, name, x) for name, x in inputs.items()}
        hidden = run.joined(base.anatomy.layer_names(base.model))
    weights = {name: base.model.get_submodule(name).weight for name in _matrices(base)}
    marks = {name: fingerprint(weight) for name, weight in weights.items()}
    return Reference(made, places, logs, hidden, inputs, outputs, marks)


NAMED = ("hidden", "inputs", "outputs", "marks")


def write_reference(reference: Reference, path: Path) -> None:
    """Store a reference as safetensors."""
    flat: dict[str, Tensor] = {}
    for at, batch in enumerate(reference.batches):
        flat |= {f"batches/{at}/{key}": value for key, value in batch.items()}
        flat |= {f"places/{at}/{i}": index for i, index in enumerate(reference.places[at])}
        flat[f"logs/{at}"] = reference.logs[at]
    for part in NAMED:
        flat |= {f"{part}/{name}": value for name, value in getattr(reference, part).items()}
    order = {part: list(getattr(reference, part)) for part in NAMED}
    # Copies: parts of one tensor cannot be stored one by one.
    write_tensors(path, {k: v.clone() for k, v in flat.items()}, order)


def read_reference(path: Path) -> Reference:
    """A stored reference. Raises Damaged if it is not as it was written."""
    flat, order = read_tensors(path)

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in flat.items() if k.startswith(prefix)}

    counted = range(sum(key.startswith("logs/") for key in flat))
    named = {part: under(f"{part}/") for part in NAMED}
    places = [under(f"places/{at}/") for at in counted]
    return Reference(
        batches=[under(f"batches/{at}/") for at in counted],
        places=[tuple(found[str(i)] for i in range(len(found))) for found in places],
        logs=[flat[f"logs/{at}"] for at in counted],
        **{part: {name: named[part][name] for name in order[part]} for part in NAMED},
    )


@torch.no_grad()
def drift_of(
    reference: Reference, base: Base, model_folder: Path, *, cache: Decompositions | None = None
) -> Drift:
    """How far the model went, by names of `measures.MEASURES`.

    None stands where there is no such quantity: those of weights in a model that carries adapters,
    the change of activations where what is attached lies outside the linears.
    Raises DataError if the base in `model_folder` is not the one of the reference.
    """
    with untouched(base.model):
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
    with Pass(base, reference.batches) as run:
        run.watch_layers()
        for before, after in zip(reference.logs, run.logs(reference.places), strict=True):
            # Some tokens at a time: a large vocabulary in float64 is large.
            for old, new in zip(before.split(64), after.split(64), strict=True):
                for name in PREDICTIONS:
                    totals[name] += PREDICTIONS[name](old, new) * len(old)
                count += len(old)
        hidden = run.joined(list(reference.hidden))
    found = {name: total / count if count else None for name, total in totals.items()}
    alike = [geometry.cka(x, hidden[name]) for name, x in reference.hidden.items()]
    return {**found, "cka": geometry.mean(alike), "tokens": float(count)}


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
        changes.append(geometry.activation_change(change, x))
    return geometry.mean(changes)


def _weights(
    reference: Reference, base: Base, stored: StoredWeights, cache: Decompositions | None
) -> Drift:
    """What became of the matrices: those of linears, and of the embedding if it changed."""
    ratios, moved, entries, changed = [], 0.0, 0, []
    for name in reference.marks:
        delta, before = _change(reference, base, stored, name)
        share = geometry.density(delta)
        if share:
            changed.append(name)
            ratios.append(geometry.weight_change(delta, before))
            moved, entries = moved + share * delta.numel(), entries + delta.numel()
    linears = _linears(base)
    found: Drift = {
        "weight_change": geometry.mean(ratios) if changed else 0.0,
        "changed_share": geometry.changed_share(len(set(linears) & set(changed)), len(linears)),
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
    """Effective rank and share in the top space, of all changed matrices or a fixed sample."""
    shapes = [base.model.get_submodule(name).weight.shape for name in changed]
    work = sum(rows * columns * min(rows, columns) for rows, columns in shapes)
    # By the hash of the name: even steps would meet the same linear of every layer.
    drawn = sorted(changed, key=key_of)[: max(1, int(len(changed) * min(1.0, WORK / work)))]
    ranks, shares = [], []
    for name in drawn:
        delta, before = _change(reference, base, stored, name)
        if not delta.isfinite().all():
            return dict.fromkeys(("effective_rank", "top_share"))
        ranks.append(geometry.effective_rank(torch.linalg.svdvals(delta)))
        if cache is None:
            u, _, v = torch.linalg.svd(before, full_matrices=False)
        else:
            u, _, v = (part.to(delta) for part in cache.svd(before))
        k = geometry.top_directions(*before.shape)
        shares.append(geometry.top_share(delta, u[:, :k], v[:k].T))
    return {"effective_rank": geometry.mean(ranks), "top_share": geometry.mean(shares)}


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
    chosen = parted(spread(sum(counts), MEMORY // (4 * vocabulary)), counts)
    scored = [batch["scored"].nonzero(as_tuple=True) for batch in made]
    return [
        tuple(index[part] for index in places) for places, part in zip(scored, chosen, strict=True)
    ]
