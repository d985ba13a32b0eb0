"""One method against the frozen base, and against PEFT's twin of it: time, memory, inference.

A step here is forward, backward and the method's own moments up to the gradients; the optimiser
step is not included, because every method of a suite shares the same optimiser. Base, ours and
PEFT's run in one process in turn, so that a busy machine slows all three alike; the ratio of each
round is kept.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ballast.anatomy import anatomy_of, targets_of
from ballast.context import Context
from ballast.declare import MethodFile
from ballast.decompositions import Decompositions
from ballast.models import DTYPES
from ballast.tuner import Tuner, load_method
from ballast.twins import TWINS, Twin

# The profiler would report each of its starts on standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

LEAVES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY, MARKER = 512, 511
LONGEST, WARM_STEPS = 256, 4
Step = Callable[[], None]


@dataclass(frozen=True)
class Shape:
    """What a step is measured on: a Llama of this width and depth, and a batch of these tokens.

    tokens: in sequences of 256, or one shorter sequence; precision: fp32 or bf16, as in training
    (frozen weights in bf16, what trains in fp32, autocast).
    """

    hidden: int = 512
    tokens: int = 1024
    precision: str = "fp32"
    rank: int = 16
    layers: int = 4

    def model(self) -> nn.Module:
        """The base with fixed random weights."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        heads = max(1, self.hidden // 64)
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=VOCABULARY,
            max_position_embeddings=2 * LONGEST,
        )
        return LlamaForCausalLM(config).to(DTYPES[self.precision]).train()

    def batch(self) -> dict[str, Tensor]:
        """Random tokens with labels, a marker between question and response."""
        length = min(self.tokens, LONGEST)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, MARKER, (self.tokens // length, length), generator=generator)
        ids[:, length // 2] = MARKER
        return {"input_ids": ids, "labels": ids}

    def autocast(self) -> torch.autocast:
        """Training's autocast."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")


@dataclass
class Runner:
    """A model that can take a step: `forward` gives the loss, `after` works on gradients."""

    model: nn.Module
    forward: Callable[[], Tensor]
    after: Step = lambda: None
    started: float = 0.0  # seconds that its start took

    def step(self) -> None:
        """Forward, backward, and the method's work on gradients."""
        self.model.zero_grad(set_to_none=True)
        self.forward().backward()
        self.after()


def base_runner(shape: Shape, model: nn.Module) -> Runner:
    """Forward, and the gradient of activations alone: what no adapter method can avoid."""
    model.requires_grad_(False)
    batch = shape.batch()
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()

    def forward() -> Tensor:
        embedded.grad = None
        with shape.autocast():
            return model(inputs_embeds=embedded, labels=batch["labels"], use_cache=False).loss

    return Runner(model, forward)


def our_runner(shape: Shape, model: nn.Module, method: MethodFile) -> Runner:
    """A method at its defaults, past the point where all its work has begun."""
    module = load_method(method.path)
    batch = shape.batch()
    ctx = Context(
        model=model,
        anatomy=anatomy_of(model),
        hyper=hyper_of(module),
        rank=shape.rank if method.declaration.rank else None,
        targets=targets_of(model, "all", "frozen"),
        generator=torch.Generator().manual_seed(0),
        cache=Decompositions(),
        total_steps=WARM_STEPS,
        learning_rate=1e-3,
        batches=lambda n, task=None: iter([{k: v[:1] for k, v in batch.items()}] * n),
        tasks=("one",),
        response_marker=(MARKER,),
    )
    tuner = Tuner(module, ctx)
    started = time.perf_counter()
    tuner.start()
    started = time.perf_counter() - started
    disturb(ctx.trainable())

    def forward() -> Tensor:
        with shape.autocast():
            loss = model(**batch, use_cache=False).loss
        penalty = tuner.penalty()
        return loss if penalty is None else loss + penalty

    runner = Runner(model, forward, tuner.after_backward, started)
    # Masks, launches and allocations take place now, so that the steps measured have them.
    for step in range(1, WARM_STEPS + 1):
        runner.step()
        ctx.step = step
        tuner.after_step()
    return runner


def peft_runner(shape: Shape, model: nn.Module, twin: Twin, hyper: Any) -> Runner:
    """PEFT's twin of a method, at the same size."""
    import peft

    modules = {} if twin.prompt or twin.config == "IA3Config" else {"target_modules": LEAVES}
    options = twin.options(shape.rank, hyper)
    config = getattr(peft, twin.config)(task_type="CAUSAL_LM", **modules, **options)
    started = time.perf_counter()
    wrapped = peft.get_peft_model(model, config)
    started = time.perf_counter() - started
    disturb({n: p for n, p in wrapped.named_parameters() if p.requires_grad})
    batch = shape.batch()

    def forward() -> Tensor:
        with shape.autocast():
            return wrapped(**batch, use_cache=False).loss

    return Runner(wrapped, forward, started=started)


def hyper_of(module: ModuleType) -> Any:
    """The method's defaults, dropout 0; calibration, which is no part of a step, is kept short."""
    if not hasattr(module, "Hyper"):
        return None
    wanted = {"dropout": 0.0, "examples": 2}
    known = {field.name for field in dataclasses.fields(module.Hyper)}
    return module.Hyper(**{key: value for key, value in wanted.items() if key in known})


@torch.no_grad()
def disturb(parameters: dict[str, nn.Parameter]) -> None:
    """Move away from zero: at B = 0 half of the work could be skipped."""
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters.values():
        parameter += 0.01 * torch.randn(parameter.shape, generator=generator).to(parameter)


def runners(shape: Shape, method: MethodFile, with_peft: bool) -> dict[str, Runner]:
    """base, ours and, where there is one, peft."""
    model = shape.model()
    found = {"ours": our_runner(shape, copy.deepcopy(model), method)}
    twin = TWINS.get(method.name)
    if with_peft and twin is not None and twin.step:
        hyper = hyper_of(load_method(method.path))
        found["peft"] = peft_runner(shape, copy.deepcopy(model), twin, hyper)
    return {"base": base_runner(shape, model), **found}


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every step in every round; who goes first changes from round to round."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            steps[name]()
            found[name].append(time.perf_counter() - started)
    return found


def median_interval(values: list[float], level: float = 0.95) -> tuple[float, float, float]:
    """Median and its distribution-free interval from order statistics (binomial)."""
    ordered, count = np.sort(values), len(values)
    low = max(0, int(binom.ppf((1 - level) / 2, count, 0.5)) - 1)
    return float(np.median(ordered)), float(ordered[low]), float(ordered[count - 1 - low])


def saved_bytes(runner: Runner) -> int:
    """Bytes that a forward keeps for its backward, parameters and buffers apart: exact, no noise.

    Each storage counts once, whole: a view keeps what it is a view of.
    """
    own = {t.untyped_storage().data_ptr() for t in _tensors(runner.model)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = runner.forward()
    del loss
    return sum(kept.values())


def static_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(model)}
    return sum(storage.nbytes() for storage in storages.values())


def peak_bytes(runner: Runner) -> int:
    """Most memory of a step: the model's own, and the most that is allocated on top meanwhile.

    Counted by allocations, as torch's profiler notes them: exact, where a process's resident size
    depends on what its allocator has kept from before.
    """
    runner.model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        runner.step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    on_top = np.cumsum([size for _, size in changes] or [0])
    return static_bytes(runner.model) + max(0, int(on_top.max()))


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def inference(runner: Runner, prompt: int = 32, tokens: int = 16) -> tuple[Step, float]:
    """(a step that generates, bytes of its cache): unmerged, one sequence, greedy."""
    ids = torch.randint(0, VOCABULARY, (1, prompt), generator=torch.Generator().manual_seed(3))
    options = {
        "max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0,
        "eos_token_id": None, "attention_mask": torch.ones_like(ids),
        "return_dict_in_generate": True,
    }  # fmt: skip

    def generate() -> Any:
        with torch.no_grad():
            return runner.model.generate(input_ids=ids, **options)

    runner.model.eval()
    cache = generate().past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    # A prefix of ours stands beside the cache, and once for all sequences.
    for module in runner.model.modules():
        kept = getattr(module, "_kept", None)
        if kept is not None and hasattr(kept[1], "pairs"):
            held += sum(part.nbytes for pair in kept[1].pairs for part in pair)
    return generate, held
