"""What the tests of methods share: a tuner on a tiny base, a few steps, and how results compare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ballast.anatomy import anatomy_of, targets_of
from ballast.context import Context, PostHoc
from ballast.declare import read_method
from ballast.decompositions import Decompositions
from ballast.tuner import Tuner, load_method

METHODS = Path(__file__).resolve().parents[1] / "methods"
# What stands between question and response in the batches of `make_batches`.
MARKER = (61,)

# Settings without which a run of a few steps on a tiny base would not reach a method's own work.
QUICK: dict[str, dict[str, Any]] = {
    "fish": {"keep_ratio": 0.05, "examples": 5},
    "lorasculpt": {"density": 0.3, "fraction": 0.5, "alpha": 0.1, "beta": 0.1},
    "l2_sp": {"alpha": 1.0},
    "gradient_mask": {"examples": 5, "batch": 2},
    "hft": {"fraction": 0.5},
    "lisa": {"fraction": 0.5},
    "spa": {"density": 0.05, "batch": 3},
    "rosa": {"density": 0.05, "batch": 3, "fraction": 0.5},
    "dsee": {"rounds": 3},
    "diff_pruning": {
        "keep": 0.05,
        "l0": 1e-4,
        "alpha": 1.0,
        "structured": False,
    },  # gates half open
    "prompt_tuning": {"tokens": 3},
    "prefix_tuning": {"tokens": 3},
    "p_tuning": {"tokens": 3},
    "instance_prompt": {"tokens": 3, "reduction": 4},
    "disha": {"tile": 4},
    "fourierft": {"n_frequency": 40, "scaling": 30.0},
    "moe_lora": {"experts": 2},
    "hydra_lora": {"alpha_over_r": 2.0},  # bounds on bf16 are for updates of LoRA's size
    "fisher_merge": {"examples": 3},
    "model_tailor": {"examples": 3, "block": 20},
    "lora_dash": {"fraction": 0.25},
    "adalora_dash": {"fraction": 0.25},
    "flora_dash": {"fraction": 0.25},
}


def tuner_of(
    name: str,
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    *,
    rank: int = 4,
    connector: str = "frozen",
    modules: str | list[str] = "all",
    seed: int = 0,
    steps: int = 4,
    settings: dict[str, Any] | None = None,
) -> Tuner:
    """A method on a base, not started yet."""
    file = read_method(METHODS / f"{name}.py")

    def examples(count: int, task: str | None = None) -> Iterator[dict[str, Tensor]]:
        for batch in batches:
            size = min(count, len(batch["labels"]))
            count -= size
            if size:
                yield {key: value[:size] for key, value in batch.items()}

    module = load_method(file.path)
    values = file.settings({**QUICK.get(name, {}), **(settings or {})})
    ctx = Context(
        model=model,
        anatomy=anatomy_of(model),
        hyper=getattr(module, "Hyper", file.hyper)(**values),
        rank=rank if file.declaration.rank else None,
        targets=targets_of(model, modules, connector),
        generator=torch.Generator().manual_seed(seed),
        cache=Decompositions(),
        total_steps=steps,
        learning_rate=1e-2,
        connector=connector,
        batches=examples,
        response_marker=MARKER,
    )
    return Tuner(module, ctx)


@torch.no_grad()
def parents_on(model: nn.Module, count: int, size: float = 0.05) -> list[dict[str, Tensor]]:
    """Weights of `count` models tuned from a base: its layers moved, all but one tensor of each."""
    layers, generator = anatomy_of(model).layers, torch.Generator().manual_seed(3)
    names = [name for name in model.state_dict() if name.startswith(f"{layers}.")]
    found = []
    for parent in range(count):
        found.append({})
        for place, name in enumerate(names):
            weight = model.state_dict()[name]
            noise = torch.randn(weight.shape, generator=generator)
            if place != parent:
                found[-1][name] = (weight + size * noise).to(weight.dtype)
    return found


def post_hoc_on(
    name: str,
    model: nn.Module,
    tuned: list[dict[str, Tensor]],
    batches: list[dict[str, Tensor]],
    *,
    seed: int = 0,
    own: int = 0,
    settings: dict[str, Any] | None = None,
) -> PostHoc:
    """What a post-hoc method sees of parents on a base; batch i is parent i's training data."""

    def examples(parent: int, count: int) -> Iterator[dict[str, Tensor]]:
        batch = batches[parent]
        for i in range(min(count, len(batch["labels"]))):
            yield {key: value[i : i + 1] for key, value in batch.items()}

    file = read_method(METHODS / f"{name}.py")
    values = file.settings({**QUICK.get(name, {}), **(settings or {})})
    return PostHoc(
        base={key: value.clone() for key, value in model.state_dict().items()},
        tuned=tuned,
        hyper=getattr(load_method(file.path), "Hyper", file.hyper)(**values),
        generator=torch.Generator().manual_seed(seed),
        own=own,
        model=model,
        anatomy=anatomy_of(model),
        examples=examples,
    )


@torch.no_grad()
def randomise(tuner: Tuner) -> None:
    """Random non-zero adapter values: at B = 0 half of the gradients vanish."""
    generator = torch.Generator().manual_seed(7)
    for _, adapter in tuner.ctx.adapters():
        for name, parameter in adapter.named_parameters():
            if not name.startswith("base."):
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(0.1 * noise)


def optimiser_of(tuner: Tuner, weight_decay: float = 0.1) -> torch.optim.AdamW:
    return torch.optim.AdamW(tuner.parameter_groups(weight_decay), betas=(0.9, 0.999))


def train(
    tuner: Tuner,
    batches: list[dict[str, Tensor]],
    steps: int,
    optimiser: torch.optim.Optimizer | None = None,
    accumulation: int = 1,
) -> torch.optim.Optimizer:
    """The training loop's order of work, without its schedule."""
    optimiser = optimiser or optimiser_of(tuner)
    ctx = tuner.ctx
    ctx.model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        for micro in range(accumulation):
            backward(tuner, batches[(ctx.step + micro) % len(batches)], accumulation)
        tuner.after_backward()
        torch.nn.utils.clip_grad_norm_(list(ctx.trainable().values()), 1.0)
        optimiser.step()
        ctx.step += 1
        tuner.after_step()
    ctx.model.eval()
    return optimiser


def backward(tuner: Tuner, batch: dict[str, Tensor], accumulation: int = 1) -> None:
    loss = tuner.ctx.model(**batch).loss
    penalty = tuner.penalty()
    if penalty is not None:
        loss = loss + penalty
    (loss / accumulation).backward()


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    return model(**batch).logits


@torch.no_grad()
def distance(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference relative to that of `expected`."""
    scale = torch.linalg.vector_norm(expected.double()).clamp_min(1e-300)
    return float(torch.linalg.vector_norm(found.double() - expected.double()) / scale)


def same_bytes(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
