"""What a method costs: its step over the frozen base's and over PEFT's; and where time goes.

A step here is forward, backward and the method's own moments up to the gradients; the optimiser
step is not included, because every method of a suite shares the same optimiser. Base, ours and
PEFT's run in one process in turn, so that a busy machine slows all three alike; the ratio of each
round is kept.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import binom

from ballast.anatomy import anatomy_of, targets_of
from ballast.context import Context
from ballast.declare import MethodFile
from ballast.decompositions import Decompositions
from ballast.tuner import Tuner, load_method

RANK = 16
SHAPE = {"hidden": 512, "layers": 4, "batch": 4, "length": 256}
# PEFT's configuration for the methods that it has; LoRA+ differs from LoRA in the optimiser alone.
PEFT: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora_plus": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


def median_interval(values: list[float], level: float = 0.95) -> tuple[float, float, float]:
    """Median and its distribution-free interval from order statistics (binomial)."""
    ordered, count = np.sort(values), len(values)
    low = max(0, int(binom.ppf((1 - level) / 2, count, 0.5)) - 1)
    return float(np.median(ordered)), float(ordered[low]), float(ordered[count - 1 - low])


def make_model() -> torch.nn.Module:
    """A Llama of the benchmark's shape with fixed random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=SHAPE["hidden"],
        intermediate_size=4 * SHAPE["hidden"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=512,
        max_position_embeddings=SHAPE["length"],
    )
    return LlamaForCausalLM(config).train()


def _batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 512, (SHAPE["batch"], SHAPE["length"]), generator=generator)
    return {"input_ids": ids, "labels": ids}


def _base_step(model: torch.nn.Module) -> Callable[[], None]:
    """Forward, and the gradient of activations alone: what no adapter method can avoid."""
    model.requires_grad_(False)
    batch = _batch()
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()

    def step() -> None:
        embedded.grad = None
        model(inputs_embeds=embedded, labels=batch["labels"], use_cache=False).loss.backward()

    return step


def _our_step(model: torch.nn.Module, method: MethodFile) -> Callable[[], None]:
    module = load_method(method.path)
    ctx = Context(
        model=model,
        anatomy=anatomy_of(model),
        hyper=_hyper(module),
        rank=RANK if method.declaration.rank else None,
        targets=targets_of(model, "all", "frozen"),
        generator=torch.Generator().manual_seed(0),
        cache=Decompositions(),
        total_steps=100,
        learning_rate=1e-3,
    )
    batch = _batch()
    ctx.batches = lambda count: iter([{k: v[:1] for k, v in batch.items()}] * count)
    tuner = Tuner(module, ctx)
    tuner.start()
    _disturb(ctx.trainable())

    def step() -> None:
        model.zero_grad(set_to_none=True)
        loss = model(**batch, use_cache=False).loss
        penalty = tuner.penalty()
        (loss if penalty is None else loss + penalty).backward()
        tuner.after_backward()

    return step


def _hyper(module: ModuleType) -> Any:
    """The method's defaults, dropout 0; calibration, which is no part of a step, is kept short."""
    if not hasattr(module, "Hyper"):
        return None
    wanted = {"dropout": 0.0, "examples": 2}
    known = {field.name for field in dataclasses.fields(module.Hyper)}
    return module.Hyper(**{key: value for key, value in wanted.items() if key in known})


def _peft_step(model: torch.nn.Module, options: dict[str, Any]) -> Callable[[], None]:
    from peft import LoraConfig, get_peft_model

    leaves = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=leaves, **options)
    wrapped = get_peft_model(model, config)
    _disturb({n: p for n, p in wrapped.named_parameters() if p.requires_grad})
    batch = _batch()

    def step() -> None:
        wrapped.zero_grad(set_to_none=True)
        wrapped(**batch, use_cache=False).loss.backward()

    return step


@torch.no_grad()
def _disturb(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Move away from zero: at B = 0 half of the work could be skipped."""
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters.values():
        parameter += 0.01 * torch.randn(parameter.shape, generator=generator)


def _seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def step_times(method: MethodFile, rounds: int, with_peft: bool) -> dict[str, Any]:
    """One method's row: median ratios with 95 % intervals over interleaved rounds."""
    model = make_model()
    steps = {
        "base": _base_step(copy.deepcopy(model)),
        "ours": _our_step(copy.deepcopy(model), method),
    }
    if with_peft and method.name in PEFT:
        steps["peft"] = _peft_step(copy.deepcopy(model), PEFT[method.name])
    for step in steps.values():
        step()
    found: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(_seconds(steps[name]))
    row: dict[str, Any] = {"method": method.name, "rounds": rounds}
    row["base_ms"] = 1000 * float(np.median(found["base"]))
    pairs = [("ours", "base"), ("peft", "base"), ("ours", "peft")]
    for top, bottom in pairs:
        ratio = (None, None, None)
        if top in found and bottom in found:
            ratio = median_interval(list(np.divide(found[top], found[bottom])))
        for label, value in zip(("", "_low", "_high"), ratio, strict=True):
            row[f"{top}_over_{bottom}{label}"] = value
    return row


def time_by_phase(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Seconds by base, method and phase over the cells that finished: where a run's time goes."""
    rows = [
        {
            "base": record["identity"]["base"],
            "method": record["identity"]["method"],
            **record["costs"]["seconds"],
            "first_step": record["costs"]["first_step_seconds"],
        }
        for record in records
        if record["status"] == "ok"
    ]
    if not rows:
        return pd.DataFrame(columns=["base", "method", "cells", "total"])
    table = pd.DataFrame(rows)
    grouped = table.groupby(["base", "method"])
    sums = grouped.sum(numeric_only=True).drop(columns="first_step")
    sums.insert(0, "cells", grouped.size())
    sums["seconds_to_first_step"] = grouped["first_step"].median()
    return sums.round(2).reset_index()


def to_markdown(steps: pd.DataFrame, phases: pd.DataFrame, about: str) -> str:
    """Both tables as Markdown, with what was measured and how."""
    lines = ["# Where the time goes", "", "Seconds, summed over finished cells, by phase.", ""]
    lines += [phases.to_markdown(index=False, floatfmt=".2f"), "", "# Cost of a training step", ""]
    lines += [about, "", steps.to_markdown(index=False, floatfmt=".3f"), ""]
    return "\n".join(lines)


def write_benchmark(
    methods: dict[str, MethodFile],
    records: list[dict[str, Any]],
    folder: Path,
    rounds: int = 30,
    report: Callable[[str], None] = print,
) -> None:
    """Measure every trained method and write steps.csv, phases.csv and benchmark.md to `folder`."""
    from ballast.files import write_text

    try:
        import peft

        version = peft.__version__
    except ImportError:
        version = None
        report("PEFT is not installed: its columns stay empty (pip install -e '.[test]')")
    rows = []
    for name, method in methods.items():
        if method.declaration.trains:
            rows.append(step_times(method, rounds, version is not None))
            report(f"{name}: {rows[-1]['ours_over_base']:.2f} of the frozen base's step")
    steps, phases = pd.DataFrame(rows), time_by_phase(records)
    about = (
        f"Training step over the frozen base's own forward and activation-gradient step, and over "
        f"PEFT {version}'s: medians over {rounds} interleaved rounds with 95 % intervals; hidden "
        f"{SHAPE['hidden']}, {SHAPE['layers']} layers, {SHAPE['batch'] * SHAPE['length']} tokens, "
        f"rank {RANK}, dropout 0, fp32, {torch.get_num_threads()} threads; the optimiser step is "
        "not included."
    )
    write_text(folder / "steps.csv", steps.to_csv(index=False, lineterminator="\n"))
    write_text(folder / "phases.csv", phases.to_csv(index=False, lineterminator="\n"))
    write_text(folder / "benchmark.md", to_markdown(steps, phases, about))
