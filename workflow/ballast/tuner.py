"""A method at work on a model: runs its moments, stores and restores what it trained.

A method file writes only the moments that it needs (all take the context):

    attach(ctx)                 freeze, wrap; builds structure without drawing random numbers
    calibrate(ctx)              look at training batches before training (ctx.batches)
    initialise(ctx)             values: random from ctx.generator, or from weights
    restored(ctx)               after stored tensors were put in place: rebuild ctx.scratch
    parameter_groups(ctx)       list of {"params", "lr_scale", "weight_decay"} covering ctx.own();
                                parameters by name
    penalty(ctx)                a scalar tensor added to the loss
    after_backward(ctx)         on gradients, before clipping and the step
    after_step(ctx)             after the optimiser step; ctx.step counts it already
    merge(ctx)                  only where the common merge is not enough
    trained_count(ctx)          only where fewer numbers train than the trainable tensors hold
    report(ctx)                 numbers that the method wants in its record, by name
    post_hoc(ctx)               post-hoc methods only: new weights by name, from a PostHoc context

What must survive a kill goes into ctx.state or into persistent buffers of an Adapter.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ballast.chunks import fit_chunks
from ballast.context import Context
from ballast.errors import MethodError, SuiteError
from ballast.files import key_of

STATE = "state."
WEIGHT = "weight."


def load_method(path: Path) -> ModuleType:
    """Import a method file; its relative imports find the other method files of its folder.

    Raises MethodError if the file cannot be imported.
    """
    package = f"ballast_methods_{key_of(str(path.parent.resolve()), length=8)}"
    if package not in sys.modules:
        spec = ModuleSpec(package, loader=None, is_package=True)
        spec.submodule_search_locations = [str(path.parent.resolve())]
        module = importlib.util.module_from_spec(spec)
        sys.modules[package] = module
    try:
        return importlib.import_module(f"{package}.{path.stem}")
    except Exception as error:
        raise MethodError(f"{path.name}: {type(error).__name__}: {error}") from error


@contextmanager
def moment(name: str) -> Iterator[None]:
    """A method at work: what it raises carries the name of its moment as a note."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {name}")
        raise


class Tuner:
    """One method on one model, from a frozen base to a stored, restored or merged result."""

    def __init__(self, method: ModuleType, ctx: Context) -> None:
        self.method, self.ctx = method, ctx
        self.raised: dict[str, torch.dtype] = {}

    def start(self) -> None:
        """Attach, calibrate and initialise a fresh cell."""
        self._attach()
        for name in ("calibrate", "initialise"):
            self._run(name)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Attach without initialising and put stored tensors in place.

        Raises MethodError if the tensors are not exactly those that the method stores.
        """
        self._attach()
        for name, value in tensors.items():
            if name.startswith(STATE):
                scalar = value.ndim == 0
                self.ctx.state[name.removeprefix(STATE)] = value.item() if scalar else value.clone()
        _declare_buffers(self.ctx, tensors)
        live = self._live()
        stored = {k.removeprefix(WEIGHT): v for k, v in tensors.items() if k.startswith(WEIGHT)}
        if set(live) != set(stored):
            odd = sorted(set(live) ^ set(stored))
            raise MethodError(f"stored adapter does not fit the method: {', '.join(odd[:4])}")
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(stored[name])
            for _, adapter in self.ctx.adapters():
                adapter.restored()
        self._run("restored")

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the method made, to be stored: CPU copies, by name."""
        found = {WEIGHT + k: v.detach().cpu().clone() for k, v in self._live().items()}
        for name, value in self.ctx.state.items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            found[STATE + name] = tensor.detach().cpu().clone()
        return dict(sorted(found.items()))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser groups covering every trainable parameter once, with absolute rates.

        Names lead the order, so that two processes build the same optimiser.
        Raises MethodError if the method's groups leave a parameter out or name one twice.
        """
        trainable = self.ctx.trainable()
        own = self.ctx.own()
        connector = [name for name in trainable if name not in own]
        groups = self._run("parameter_groups") or [{"params": list(own)}]
        if connector:
            groups = [*groups, {"params": connector, "lr_scale": CONNECTOR_LR_SCALE}]
        named = [name for group in groups for name in group["params"]]
        if sorted(named) != sorted(trainable):
            odd = sorted(set(named) ^ set(trainable)) or "a parameter stands in two groups"
            raise MethodError(f"parameter_groups do not cover the trainable parameters: {odd}")
        return [
            {
                "params": [trainable[name] for name in group["params"]],
                "names": list(group["params"]),
                "lr": self.ctx.learning_rate * group.get("lr_scale", 1.0),
                "weight_decay": group.get("weight_decay", weight_decay),
            }
            for group in groups
        ]

    def penalty(self) -> Tensor | None:
        """The method's addition to the loss, or None."""
        return self._run("penalty")

    def after_backward(self) -> None:
        """The method's work on gradients."""
        self._run("after_backward")

    def after_step(self) -> None:
        """The method's work after an optimiser step."""
        self._run("after_step")

    def merge(self) -> None:
        """Make the model a plain one with the same outputs: adapters folded into their bases."""
        self._run("merge")
        for name, adapter in list(self.ctx.adapters()):
            self.ctx.replace(name, adapter.merged())
        _untie(self.ctx.model)
        self.lower()

    def lower(self) -> None:
        """Round the base's own parameters that trained in fp32 to the base's precision again.

        Scoring runs without autocast: a connector in fp32 could not take features in bf16.
        """
        for name, dtype in self.raised.items():
            parameter = self.ctx.model.get_parameter(name)
            parameter.data = parameter.data.to(dtype)

    def trained_count(self) -> int:
        """How many numbers train."""
        own = self._run("trained_count")
        if own is None:
            return sum(p.numel() for p in self.ctx.trainable().values())
        return own + sum(
            p.numel() for n, p in self.ctx.trainable().items() if n not in self.ctx.own()
        )

    def report(self) -> dict[str, float]:
        """The method's own numbers for the record."""
        return self._run("report") or {}

    def _attach(self) -> None:
        fit_chunks(self.method, next(self.ctx.model.parameters()).device)
        self.ctx.model.requires_grad_(False)
        self._run("attach")
        if self.ctx.connector == "tuned":
            if self.ctx.anatomy.connector is None:
                raise SuiteError("connector: tuned, but the base has no connector; allowed: frozen")
            self.ctx.model.get_submodule(self.ctx.anatomy.connector).requires_grad_(True)
        # A step of AdamW is smaller than bf16 can add to a weight: what trains is kept in fp32.
        for name, parameter in self.ctx.trainable().items():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                self.raised[name] = parameter.dtype
                parameter.data = parameter.data.float()
        self.ctx.trained = tuple(self.ctx.trainable())

    def _run(self, name: str) -> Any:
        function = getattr(self.method, name, None)
        if function is None:
            return None
        with moment(name):
            return function(self.ctx)

    def _live(self) -> dict[str, Tensor]:
        """Trainable parameters and adapters' buffers, live."""
        found: dict[str, Tensor] = dict(self.ctx.trainable())
        for name, adapter in self.ctx.adapters():
            found.update({f"{name}.{k}": v for k, v in adapter.own_tensors().items()})
        return found


# Same-lab scripts (SPIDER, NRCA, LoRASculpt) tune the connector at 2e-5 beside 2e-4.
CONNECTOR_LR_SCALE = 0.1


def _declare_buffers(ctx: Context, tensors: dict[str, Tensor]) -> None:
    """Allocate the adapters' optional buffers (None at attachment) that the stored tensors have."""
    for name, adapter in ctx.adapters():
        for buffer, value in list(adapter._buffers.items()):
            stored = tensors.get(f"{WEIGHT}{name}.{buffer}")
            if value is None and stored is not None:
                setattr(adapter, buffer, torch.empty_like(stored, device=_device(adapter)))


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _untie(model: nn.Module) -> None:
    """Say in the config that embedding and head differ, where merging an embedding parted them.

    Otherwise a saved model would be tied again when it is loaded.
    """
    head = model.get_output_embeddings()
    if head is None or head.weight is model.get_input_embeddings().weight:
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
