"""PEFT bridge: any configuration of PEFT's that changes modules, run as a method as it is.

`config` is what PEFT saves as adapter_config.json: written out in the suite, or the path of such a
file or of a folder that holds one. The folders experiments/<method>/<name>/ of PEFT's own benchmark
(method_comparison) are read as they are. What the files say is part of the cell's settings, so that
an edited configuration is another cell.

What of the two files counts: of adapter_config.json everything, except that
  * `target_modules` that are missing or "all-linear" are the suite's modules (IA3: key, value and
    down projections among them; LN tuning: the layers' norms; trainable tokens: the embedding);
    names that it gives are looked up in the decoder layers, the embedding and an adapted connector;
  * AdaLoRA's total_step becomes that of the cell, tinit, tfinal and deltaT in proportion;
  * SHiRA without a random_seed gets the cell's (PEFT would draw the same mask for every seed).
Of training_params.json only optimizer_kwargs.lr counts, as the rate where the suite names none
(without the file 1e-4, which is that benchmark's default): steps, batch, decay and schedule are
those of the suite, for every method. An optimiser of its own (LoRA+, LoRA-FA, Riemannian) is
refused rather than left out, and so is a text that a prefix starts from.

PEFT's per-step work is done: the allocation of AdaLoRA and AdaMSS after every optimiser step, the
orthogonality of AdaLoRA and the losses of KaSA and MonteCLoRA as a penalty. PEFT draws from torch's
global generator, which is seeded from the cell's and put back. Everything that PEFT holds beside
the trained tensors is stored (index sets, projections, decompositions, a changed base weight) and
put back, whether it is a parameter, a buffer or an attribute that no state dict has.

The model is scored unmerged; `ballast export --merged` merges where PEFT can. Whether a start is
the base and random depends on the configuration; the declaration speaks of the default, OFT.

What runs (tests/test_peft_bridge.py, on tiny bases): LoRA with DoRA, PiSSA, OLoRA, orthogonal,
MiCA, KaSA, MonteCLoRA, VeLoRA and BD-LoRA, AdaLoRA, AdaMSS, OFT, BOFT, HRA, OSF, LoHa, LoKr, SHiRA,
C3A, IA3, VeRA, PVeRA, FourierFT, WaveFT, MiSS, Bat and mini, RandLoRA, RoAd, HiRA, GLoRA, GraLoRA,
DeLoRA, DEFT, Lily, BEFT, LN tuning, FRoD, VB-LoRA, UniLoRA, TinyLoRA, PSOFT, PEANuT, Supertuning,
trainable tokens and LLaMA-Adapter (ADAPTION_PROMPT). Their natures differ: KaSA, C3A, VB-LoRA and
UniLoRA do not start as the base; Lily, LLaMA-Adapter and BEFT on linears without a bias cannot be
merged; AdaMSS sizes its tensors by a random clustering, so that it reloads under its own seed only;
LN tuning and LLaMA-Adapter need fp32; PiSSA, OLoRA, MiCA and PSOFT refuse a float64 base.
Refused, with a reason: prompt, prefix and p-tuning, CPT, Cartridge, multitask prompts (they change
the inputs or the cache, not modules; here prompt_tuning, prefix_tuning and p_tuning are files of
their own), X-LoRA, Poly, Arrow (they need trained adapters or task ids), Shadow (a second model),
EVA, CorDA, LoRA-GA, LoftQ (they start from data or a quantised base; `corda` is a file of its own),
modules_to_save and target_parameters (PEFT's wrapper handles them, not the injection).
Trainable: what PEFT trains, counted.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError

ADAPTER = "default"
STORED = "peft/"

declaration = Declaration(
    title="PEFT bridge",
    citation="Mangrulkar et al., PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods, "
    "2022, github.com/huggingface/peft (version 0.21.2); the paper is the configuration's own",
    family="reparameterization",
    merges=False,
    learning_rate=1e-4,
    learning_rate_source="method_comparison/MetaMathQA/default_training_params.json of PEFT",
    learning_rate_at="config.training_params.optimizer_kwargs.lr",
)


@dataclass(frozen=True)
class Hyper:
    config: dict = hyper(  # noqa: RUF009
        {"adapter_config": {"peft_type": "OFT", "r": 0, "oft_block_size": 32}},
        "OFT (Qiu et al. 2023) with PEFT's default block; name another one",
        files=("adapter_config.json", "training_params.json"),
    )

    def __post_init__(self):
        ours = {
            "PROMPT_TUNING": "prompt_tuning",
            "PREFIX_TUNING": "prefix_tuning",
            "P_TUNING": "p_tuning",
            "MULTITASK_PROMPT_TUNING": "prompt_tuning",
            "CPT": "prompt_tuning",
            "CARTRIDGE": "prefix_tuning",
        }
        starts = {"corda": "method `corda`", "eva": None, "lora_ga": None, "loftq": None}
        optimisers = {"lora+": "`lora_plus`", "lora-fa": "`lora_fa`"}
        adapter = self.config.get("adapter_config", {})
        training = self.config.get("training_params", {})
        kind = adapter.get("peft_type")
        if kind is None:
            raise ValueError(
                "config: no peft_type; what PEFT saves as adapter_config.json is meant"
            )
        if kind in ours:
            raise ValueError(
                f"config: {kind} changes inputs or cache, not modules; use method `{ours[kind]}`"
            )
        if kind in ("XLORA", "POLY", "SHADOW"):
            raise ValueError(
                f"config: {kind} needs more than one base and one adapter; not run here"
            )
        for key in ("arrow_config", "modules_to_save", "target_parameters", "layer_replication"):
            if adapter.get(key):
                raise ValueError(f"config.{key}: {adapter[key]!r}; not run here, leave it out")
        start = adapter.get("init_lora_weights")
        if start in starts:
            instead = starts[start] or "another start"
            raise ValueError(
                f"config.init_lora_weights: {start!r} starts from data or a quantised base, which "
                f"the configuration does not hold; use {instead}"
            )
        optimiser = training.get("optimizer_type", "AdamW")
        if optimiser != "AdamW":
            instead = optimisers.get(optimiser, "another configuration")
            raise ValueError(
                f"training_params.optimizer_type: {optimiser!r}; every method is trained by AdamW; "
                f"use {instead}"
            )
        if training.get("init_kv_cache_prefix"):
            raise ValueError("training_params.init_kv_cache_prefix: not run here")


def attach(ctx: Context) -> None:
    """Inject the adapter; PEFT's draws are made here, and replaced where a cell is restored."""
    peft = _peft()
    config = _configuration(ctx, peft)
    before = {id(p): _fingerprint(p) for p in ctx.model.parameters()}
    kind = config.peft_type.value
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in ctx.model.parameters())
    if half and kind in ("LN_TUNING", "ADAPTION_PROMPT"):
        raise SuiteError(f"precision: {kind} trains in fp32, and PEFT does not cast its outputs")
    tuner_class = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    given = {ADAPTER: config} if config.is_adaption_prompt else config
    with _seeded(ctx), _refusal(config), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        tuner = tuner_class(ctx.model, given, ADAPTER)
    if not any(p.requires_grad for p in ctx.model.parameters()):
        raise SuiteError(f"config: {kind} trains nothing on these modules")
    peft.tuners.tuners_utils.cast_adapter_dtype(ctx.model, ADAPTER)
    ctx.scratch["peft"] = tuner
    ctx.scratch["untouched"] = {
        id(p) for p in ctx.model.parameters() if before.get(id(p)) == _fingerprint(p)
    }
    _refer(ctx)


def restored(ctx: Context) -> None:
    """Put everything back that PEFT holds beside the trained tensors, and what it has switched."""
    tuner = ctx.scratch["peft"]
    live = dict(_kept(ctx))
    for name in [name for name in ctx.state if name.startswith(STORED)]:
        value, path = torch.as_tensor(ctx.state[name]), name.removeprefix(STORED)
        if path == "on":
            for on, parameter in zip(value.tolist(), ctx.trainable().values(), strict=True):
                parameter.requires_grad_(on)
        elif path.startswith("rank_pattern/"):
            pattern = _config(tuner).rank_pattern or {}
            pattern[path.removeprefix("rank_pattern/")] = value.tolist()
            _config(tuner).rank_pattern = pattern
        elif isinstance(live.get(path), int):
            _put(tuner, path, int(value))
        elif path in live and live[path].shape == value.shape:
            with torch.no_grad():
                live[path].copy_(value)
        else:
            _put(tuner, path, value.to(next(ctx.model.parameters()).device))
    _refer(ctx)


def penalty(ctx: Context) -> Tensor | None:
    """What PEFT would add to the loss."""
    tuner = ctx.scratch["peft"]
    if _config(tuner).peft_type.value == "ADALORA":
        return _config(tuner).orth_reg_weight * _orthogonality(tuner)
    losses = [getattr(tuner, name, None) for name in ("_get_kasa_loss", "_get_monteclora_loss")]
    terms = [term for loss in losses if loss and isinstance(term := loss(), Tensor)]
    return torch.stack([term.squeeze() for term in terms]).sum() if terms else None


def after_step(ctx: Context) -> None:
    tuner = ctx.scratch["peft"]
    if hasattr(tuner, "update_and_allocate"):
        tuner.update_and_allocate(ctx.step)
    elif not getattr(_config(tuner), "monteclora_config", None):
        return  # nothing but the trained tensors changes from step to step
    _refer(ctx)


def merge(ctx: Context) -> None:
    """PEFT's own merge; SuiteError where it has none for this configuration."""
    tuner = ctx.scratch["peft"]
    config = _config(tuner)
    if not hasattr(tuner, "merge_and_unload"):
        raise SuiteError(f"{config.peft_type.value} cannot be merged into plain weights")
    # PEFT adds to the weight where it lies, and would so change a head that is tied to it.
    embedding = ctx.model.get_submodule(ctx.anatomy.embeddings)
    if hasattr(embedding, "base_layer") and config.peft_type.value != "TRAINABLE_TOKENS":
        weight = embedding.base_layer.weight
        embedding.base_layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    with _refusal(config):
        tuner.merge_and_unload()
    vars(ctx.model).pop("peft_config", None)


def report(ctx: Context) -> dict[str, float]:
    pattern = getattr(_config(ctx.scratch["peft"]), "rank_pattern", None) or {}
    if not any(isinstance(kept, list) for kept in pattern.values()):
        return {}
    return {"final_budget": float(sum(sum(kept) for kept in pattern.values()))}


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise SuiteError(
            "peft_bridge: PEFT is not installed; pip install peft==0.21.2 (or '.[test]')"
        ) from None
    return peft


def _config(tuner: nn.Module) -> Any:
    return tuner.peft_config[ADAPTER]


def _configuration(ctx: Context, peft: Any) -> Any:
    """PEFT's configuration object with this cell's modules and steps."""
    values = dict(ctx.hyper.config["adapter_config"]) | {"inference_mode": False}
    kinds = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    if values["peft_type"] not in kinds:
        allowed = ", ".join(sorted(kind.value for kind in kinds))
        raise SuiteError(f"config.peft_type: {values['peft_type']!r}; PEFT has {allowed}")
    kind = kinds[values["peft_type"]]
    unknown = sorted(set(values) - set(kind.__dataclass_fields__))
    # Older versions of PEFT wrote keys that are gone; where they say nothing, nothing is lost.
    values = {k: v for k, v in values.items() if k not in unknown}
    unknown = [key for key in unknown if ctx.hyper.config["adapter_config"][key]]
    if unknown:
        raise SuiteError(
            f"config.{unknown[0]}: {kind.__name__} of PEFT {peft.__version__} has no such key"
        )
    if "progressbar" in kind.__dataclass_fields__:
        values["progressbar"] = False
    if values["peft_type"] == "ADALORA":
        values |= _allocation_steps(values, ctx.total_steps)
    if "random_seed" in kind.__dataclass_fields__ and values.get("random_seed") is None:
        values["random_seed"] = int(torch.randint(2**31, (), generator=ctx.generator))
    with _refusal(kind.__name__):
        config = kind(**values)
    if not config.is_adaption_prompt:
        _choose_modules(ctx, config, peft)
    return config


def _allocation_steps(values: dict[str, Any], total: int) -> dict[str, int]:
    """AdaLoRA's steps in proportion to those of the cell."""
    planned = values.get("total_step") or total
    share = total / planned
    steps = {"total_step": total}
    for key, least in (("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
        if key in values:
            steps[key] = max(least, round(values[key] * share))
    return steps


def _choose_modules(ctx: Context, config: Any, peft: Any) -> None:
    """Replace the configuration's choice of modules by the full names that it means here."""
    named = config.target_modules not in (None, "all-linear")
    if named:
        inside = [ctx.anatomy.layers] + (
            [ctx.anatomy.connector] if ctx.connector == "adapted" else []
        )
        names = [
            name
            for name, _ in ctx.model.named_modules()
            if name == ctx.anatomy.embeddings or name.startswith(tuple(f"{i}." for i in inside))
        ]
    else:
        names = _suites_modules(ctx, config)
        config.target_modules = {name.split(".")[-1] for name in names}
    matches = peft.tuners.tuners_utils.check_target_module_exists
    chosen = {name for name in names if matches(config, name)}
    if not chosen:
        raise SuiteError(f"config.target_modules: {config.target_modules!r} matches no module")
    if hasattr(config, "feedforward_modules"):
        listed = config.feedforward_modules
        down = {n for n in chosen if ctx.anatomy.role(n) == "down"}
        config.feedforward_modules = (
            down if listed is None else {n for n in chosen if n.endswith(tuple(listed))}
        )
    config.target_modules = chosen
    for key in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if getattr(config, key, None) is not None:
            setattr(config, key, None)


def _suites_modules(ctx: Context, config: Any) -> list[str]:
    """The suite's modules, for a configuration that names none."""
    kind = config.peft_type.value
    if kind == "TRAINABLE_TOKENS":
        return [ctx.anatomy.embeddings]
    if kind == "LN_TUNING":
        layers = f"{ctx.anatomy.layers}."
        return [n for n, m in ctx.model.named_modules() if n.startswith(layers) and _is_norm(m)]
    if kind == "IA3":
        return [n for n in ctx.targets if ctx.anatomy.role(n) in ("k", "v", "down")]
    return list(ctx.targets)


def _is_norm(module: nn.Module) -> bool:
    parameters = dict(module.named_parameters())
    return bool(parameters) and all(p.ndim == 1 for p in parameters.values())


@contextlib.contextmanager
def _seeded(ctx: Context) -> Iterator[None]:
    """The global generators start from the cell's seed inside, and are as before afterwards."""
    seed = int(torch.randint(2**62, (), generator=ctx.generator))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _refusal(config: Any) -> Iterator[None]:
    """What PEFT raises becomes one message that names the configuration."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, RuntimeError, LookupError) as error:
        kind = config if isinstance(config, str) else type(config).__name__
        raise SuiteError(f"config: PEFT refuses this {kind}: {error}") from error


def _orthogonality(tuner: nn.Module) -> Tensor:
    """Mean of ||P^T P - I||_F over AdaLoRA's factors, as in the forward of PEFT's model."""
    terms = []
    for name, p in tuner.model.named_parameters():
        if f"lora_A.{ADAPTER}" in name or f"lora_B.{ADAPTER}" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.linalg.matrix_norm(gram - torch.eye(*gram.shape).to(gram)))
    return torch.stack(terms).mean()


def _fingerprint(parameter: Tensor) -> int:
    if not parameter.numel():
        return 0
    return int(torch.hash_tensor(parameter.detach()).view(torch.int64))


def _kept(ctx: Context) -> Iterator[tuple[str, Tensor | int]]:
    """What PEFT holds beside the trained tensors and the untouched base, live, by path."""
    tuner, skipped = ctx.scratch["peft"], set(ctx.scratch["untouched"])
    skipped |= {id(p) for p in ctx.model.parameters() if p.requires_grad}
    skipped |= {id(p) for p in ctx.trainable().values()}
    skipped |= {id(b) for b in _base_buffers(tuner)}
    registered = set()
    for name, tensor in [*tuner.named_parameters(), *tuner.named_buffers()]:
        registered.add(id(tensor))
        if id(tensor) not in skipped:
            yield name, tensor
    seen: set[int] = set()
    for name, module in tuner.named_modules():
        if type(module).__module__.startswith("peft."):
            for path, tensor in _attributes(vars(module), seen):
                if id(tensor) not in registered | skipped:
                    yield f"{name}/{path}", tensor


def _base_buffers(tuner: nn.Module) -> Iterator[Tensor]:
    """Buffers of modules that are not PEFT's, such as rotary frequencies."""
    for module in tuner.modules():
        if not type(module).__module__.startswith("peft."):
            yield from (b for b in module._buffers.values() if b is not None)


def _attributes(values: Any, seen: set[int], plain: bool = False) -> Iterator[tuple[str, Any]]:
    """Tensors, and counters of plain objects, among attributes that torch does not know."""
    if id(values) in seen:
        return
    seen.add(id(values))
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, Tensor) or (plain and type(value) is int):
            yield str(key), value
        elif isinstance(value, nn.Module):
            continue
        elif isinstance(value, dict | list):
            yield from ((f"{key}/{rest}", t) for rest, t in _attributes(value, seen))
        elif _is_pefts(value):
            inner = _attributes(vars(value), seen, plain=True)
            yield from ((f"{key}/{rest}", found) for rest, found in inner)


def _is_pefts(value: Any) -> bool:
    """Whether it is a plain object of PEFT's that may hold state; a configuration does not."""
    inside = type(value).__module__.startswith("peft.tuners") and hasattr(value, "__dict__")
    return inside and not hasattr(value, "peft_type")


def _put(tuner: nn.Module, path: str, value: Tensor | int) -> None:
    """Set the attribute, or the entry of a dictionary or list, at a path of `_kept`."""
    name, *keys = path.split("/")
    place: Any = tuner.get_submodule(name)
    for key in keys[:-1]:
        if isinstance(place, list):
            place = place[int(key)]
        else:
            place = place[key] if isinstance(place, dict) else getattr(place, key)
    if isinstance(place, dict):
        place[keys[-1]] = value
    else:
        setattr(place, keys[-1], value)


def _refer(ctx: Context) -> None:
    """Let the cell's state point at everything that must survive a reload."""
    for name in [name for name in ctx.state if name.startswith(STORED)]:
        del ctx.state[name]
    ctx.state |= {f"{STORED}{path}": tensor for path, tensor in _kept(ctx)}
    tuner = ctx.scratch["peft"]
    if hasattr(tuner, "update_and_allocate"):
        on = [p.requires_grad for p in ctx.trainable().values()]
        ctx.state[f"{STORED}on"] = torch.tensor(on)
        for name, kept in (getattr(_config(tuner), "rank_pattern", None) or {}).items():
            ctx.state[f"{STORED}rank_pattern/{name}"] = torch.tensor(kept)
