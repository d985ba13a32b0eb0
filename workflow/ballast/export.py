"""Taking a finished cell elsewhere: as an adapter of PEFT's format, or as plain merged weights.

An adapter is LoRA on the *untouched* base: A and B of every layer, DoRA's magnitude where there is
one, and for methods that start from the weight itself (PiSSA, MiLoRA, OLoRA, CorDA) the part that
they subtracted, as further rows and columns: s (B A - B0 A0), of rank 2r.

adapter_config.json and adapter_model.safetensors are what `PeftModel.from_pretrained` reads. vLLM
reads the same two files, with its own limits: no DoRA, ranks up to its max_lora_rank (16 unless it
is raised), linears that it knows and no embeddings. So that both take one file, all layers have one
rank (smaller ones are filled up with zeros) and there are no rank or alpha patterns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ballast.adapters import Adapter, LoraForm
from ballast.errors import BallastError
from ballast.files import read_json, replacing, write_json
from ballast.layout import Layout
from ballast.outcome import ADAPTER

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Both sides are exact but for rounding; what is left out is of the size of the update itself.
TOLERANCE = 1e-4


def find_cell(text: str, results: Path) -> Path:
    """The folder of a finished cell, by its path or by its id or a beginning of that.

    Raises BallastError if none or several fit.
    """
    if (Path(text) / "adapter.safetensors").is_file():
        return Path(text)
    stored = (path.parent for path in results.glob("*/cells/*/adapter.safetensors"))
    found = sorted(folder for folder in stored if folder.name.startswith(text))
    if len(found) != 1:
        names = ", ".join(str(folder) for folder in found[:3])
        raise BallastError(
            f"{text}: {len(found)} trained cells begin so{': ' if found else ''}{names}; "
            "give a cell's folder, or a beginning of its id that is unique"
        )
    return found[0]


def export_cell(cell: Path, folder: Path, layout: Layout, merged: bool = False) -> str:
    """Write a cell's adapter, or with `merged` its plain weights, to `folder`; says what was done.

    Raises BallastError where the cell's method is not of that kind, before anything is written.
    """
    from ballast.cell import load_for, make_tuner
    from ballast.tensorfile import read_tensors
    from ballast.tuner import WEIGHT

    tensors, about = read_tensors(cell / ADAPTER)
    spec = json.loads(about["spec"])
    ready = read_json(layout.suite(spec["suite"]) / "bases" / f"{spec['base']}.json")
    if ready["base_key"] != spec["base_key"]:
        raise BallastError(f"{cell.name}: its base {spec['base']} is another one by now")
    base = load_for(spec, Path(ready["model"]))
    tuner = None
    if spec["family"] == "post-hoc":
        if not merged:
            raise BallastError(f"{cell.name}: {spec['method']} edits plain weights; use --merged")
        state = base.model.state_dict()
        for name, value in tensors.items():
            state[name.removeprefix(WEIGHT)].copy_(value)
    else:
        tuner = make_tuner(base, spec, layout)
        tuner.restore(tensors)
    if merged:
        return _write_merged(base, tuner, spec, folder)
    source = spec["source"].get("hub") or str(Path(ready["model"]).resolve())
    rank = write_adapter(tuner, folder, source, spec["source"].get("revision"), spec["method"])
    return f"{folder}: adapter of rank {rank} for {source}"


def write_adapter(
    tuner: Any, folder: Path, base: str, revision: str | None = None, method: str = "this method"
) -> int:
    """Write a tuner's adapters in PEFT's format; returns their rank.

    base, revision: what the adapter's users load first. Raises BallastError if the method is no
    LoRA in the end.
    """
    from safetensors.torch import save_file

    forms = lora_forms(tuner, method)
    scales = {form.scale for form in forms.values()}
    rank = max(len(form.a) for form in forms.values())
    scale = scales.pop() if len(scales) == 1 else None
    # alpha is an integer in the files of PEFT; where alpha / r is not s, B takes s.
    alpha = round(scale * rank) if scale else 0
    alpha = alpha if scale and alpha / rank == scale else None
    tensors: dict[str, Tensor] = {}
    for name, form in forms.items():
        b = form.b if alpha is not None else form.scale * form.b
        layer = tuner.ctx.model.get_submodule(name)
        tensors |= _named(name, _filled(form.a, rank), _filled(b.T, rank).T, layer)
        if form.magnitude is not None:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = form.magnitude
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    config = {
        "peft_type": "LORA",
        "task_type": None if tuner.ctx.anatomy.kind == "vision-language" else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": any(form.magnitude is not None for form in forms.values()),
        "target_modules": _targets(tuner.ctx.model, list(forms)),
        "inference_mode": True,
    }
    with replacing(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    write_json(folder / CONFIG, config)
    return rank


def lora_forms(tuner: Any, method: str = "this method") -> dict[str, LoraForm]:
    """Every adapted module's LoRA by the module's name.

    Raises BallastError if something trains that no LoRA holds, or if a layer computes more than its
    form says.
    """
    ctx = tuner.ctx
    forms: dict[str, LoraForm] = {}
    for name, layer in ctx.adapters():
        form = layer.as_lora()
        if form is None or not _is_whole(layer, form):
            raise BallastError(_no_lora(method, f"{name} ({type(layer).__name__}) is none"))
        forms[name] = form
    outside = [n for n in ctx.trainable() if not n.startswith(tuple(f"{m}." for m in forms))]
    if outside or not forms:
        what = f"{outside[0]} trains itself" if outside else "there is no adapter"
        raise BallastError(_no_lora(method, what))
    if len({form.magnitude is None for form in forms.values()}) > 1:
        raise BallastError(_no_lora(method, "PEFT has a magnitude in all layers or in none"))
    return forms


def _no_lora(method: str, why: str) -> str:
    return f"{method} is no LoRA in the end: {why}; --merged writes plain weights where it merges"


@torch.no_grad()
def _is_whole(layer: Adapter, form: LoraForm) -> bool:
    """Whether the form is all that a layer adds, measured by the update that it merges to."""
    embedding = isinstance(layer.base, nn.Embedding)
    low = form.scale * (form.b @ form.a)
    weight = layer.base.weight.to(low.dtype)
    merged = layer.merged_weight()
    if embedding:
        weight, merged = weight.T, merged.T
    if getattr(layer, "A0", None) is not None:
        weight = weight + layer.scale * (layer.B0 @ layer.A0)
    expected = weight + low
    if form.magnitude is not None:
        norms = torch.linalg.vector_norm(expected, dim=1)
        expected = expected * (form.magnitude / norms)[:, None]
    update = torch.linalg.matrix_norm(merged - weight)
    rounding = torch.finfo(merged.dtype).eps * torch.linalg.matrix_norm(weight)
    return bool(torch.linalg.matrix_norm(expected - merged) <= TOLERANCE * update + 10 * rounding)


def _filled(rows: Tensor, rank: int) -> Tensor:
    """Rows [r, .] with zeros below, up to the common rank."""
    return nn.functional.pad(rows, (0, 0, 0, rank - len(rows)))


def _named(name: str, a: Tensor, b: Tensor, layer: Adapter) -> dict[str, Tensor]:
    if isinstance(layer.base, nn.Embedding):
        return {
            f"{PREFIX}{name}.lora_embedding_A": a,
            f"{PREFIX}{name}.lora_embedding_B": b,
        }
    return {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}


def _targets(model: nn.Module, names: list[str]) -> list[str]:
    """Leaf names where they mean exactly these modules, full names otherwise."""
    leaves = sorted({name.rpartition(".")[2] for name in names})
    endings = tuple(f".{leaf}" for leaf in leaves)
    meant = {
        name
        for name, _ in model.named_modules()
        if name.endswith(endings) and not any(name.startswith(f"{n}.") for n in names)
    }
    return leaves if meant == set(names) else sorted(names)


def _write_merged(base: Any, tuner: Any, spec: dict[str, Any], folder: Path) -> str:
    """Save the base with the cell's weights in it as a folder of transformers."""
    if tuner is not None:
        try:
            tuner.merge()
        except (TypeError, BallastError) as error:
            raise BallastError(
                f"{spec['method']} cannot be merged ({error}), and stays with Ballast"
            ) from None
    if any(isinstance(module, Adapter) for module in base.model.modules()):
        raise BallastError(f"{spec['method']} cannot be merged, and stays with Ballast")
    base.model.save_pretrained(folder)
    (base.processor or base.tokenizer).save_pretrained(folder)
    return f"{folder}: {type(base.model).__name__} with {spec['method']} merged into its weights"
