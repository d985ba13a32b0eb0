"""What a method's moments receive: the cell's context, and that of a post-hoc method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ballast.adapters import Adapter
from ballast.anatomy import Anatomy
from ballast.decompositions import Decompositions
from ballast.errors import SuiteError


@dataclass
class Context:
    """A training cell as its method sees it.

    model: the base, every parameter frozen when `attach` is called.
    anatomy: where the language model, the connector and the vision tower lie in it.
    hyper: the method's `Hyper`, resolved.
    rank: the suite's rank, or None for methods without one.
    targets: names of the modules to adapt (language model, and connector if it is adapted).
    generator: CPU generator seeded by the cell's seed; every random draw of a method uses it.
    cache: decompositions of base weights, shared by the cells of a base.
    total_steps: optimiser steps planned; step: those done.
    learning_rate: the peak rate of the schedule.
    connector: frozen, tuned (in full, by the engine) or adapted (its linears are targets).
    state: tensors and numbers of the method's own that survive a kill and a reload.
    scratch: working values that `attach` or `restored` can make again; never stored.
    batches: batches(n, task=None) yields training batches with labels that hold n examples in all
        (fewer if there are fewer), of the whole target or of one of its tasks: dictionaries of
        tensors on the model's device whose first dimension counts the examples. None where a stored
        cell is only scored.
    tasks: names of the target's tasks, one unless it is a mixture.
    response_marker: token ids that stand between question and response in every prompt.
    trained: names of the parameters that train, frozen when the method has been attached.
    resolved: what an equal budget asked for and what size it gave; empty without one.
    """

    model: nn.Module
    anatomy: Anatomy
    hyper: Any
    rank: int | None
    targets: tuple[str, ...]
    generator: torch.Generator
    cache: Decompositions
    total_steps: int
    learning_rate: float
    connector: str = "frozen"
    step: int = 0
    state: dict[str, Tensor | float | int] = field(default_factory=dict)
    scratch: dict[str, Any] = field(default_factory=dict)
    batches: Callable[..., Iterator[dict[str, Tensor]]] | None = None
    tasks: tuple[str, ...] = ()
    response_marker: tuple[int, ...] = ()
    trained: tuple[str, ...] | None = None
    resolved: dict[str, float] = field(default_factory=dict)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put `module` where the model has the module called `name`."""
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)

    def adapters(self) -> Iterator[tuple[str, Adapter]]:
        """Adapted modules by name, in the model's order."""
        for name, module in self.model.named_modules():
            if isinstance(module, Adapter):
                yield name, module

    def in_connector(self, name: str) -> bool:
        """Whether a module lies in the connector."""
        connector = self.anatomy.connector
        return connector is not None and f"{name}.".startswith(f"{connector}.")

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that train, by name, whether or not this step gives them a gradient."""
        named = self.model.named_parameters()
        if self.trained is None:
            return {n: p for n, p in named if p.requires_grad}
        chosen = set(self.trained)
        return {n: p for n, p in named if n in chosen}

    def own(self) -> dict[str, nn.Parameter]:
        """Parameters that the method itself trains: without a connector tuned beside it."""
        return {
            name: p
            for name, p in self.trainable().items()
            if not (self.connector == "tuned" and self.in_connector(name))
        }


@dataclass
class PostHoc:
    """Finished parents as a post-hoc method sees them.

    base: weights of the untouched base by name (CPU, as stored).
    tuned: for each parent, the weights that differ from the base, by the same names, merged.
    generator: CPU generator seeded by the cell's seed.
    own: index in `tuned` of the parent that was trained on the cell's own target.
    model, anatomy: a loaded base to measure on; `load` puts weights into it.
    examples: examples(parent, n) yields up to n training examples of that parent's own target, one
        a batch, with labels. Measuring on them is allowed; training is not.
    """

    base: dict[str, Tensor]
    tuned: list[dict[str, Tensor]]
    hyper: Any
    generator: torch.Generator
    own: int = 0
    model: nn.Module | None = None
    anatomy: Anatomy | None = None
    examples: Callable[[int, int], Iterator[dict[str, Tensor]]] | None = None

    def only(self) -> dict[str, Tensor]:
        """The changed weights of the one parent. Raises SuiteError if there are several."""
        if len(self.tuned) != 1:
            raise SuiteError(f"parents: {len(self.tuned)} given; this method works on exactly one")
        return self.tuned[0]

    def deltas(self, parent: int = 0) -> dict[str, Tensor]:
        """theta_tuned - theta_base of one parent, fp32, only tensors that changed."""
        return {
            name: weight.float() - self.base[name].float()
            for name, weight in self.tuned[parent].items()
        }

    @torch.no_grad()
    def load(self, parent: int | None) -> nn.Module:
        """Put a parent's weights (None: the base's) into `model`, which is returned."""
        assert self.model is not None, "no model to load weights into"
        changed = {} if parent is None else self.tuned[parent]
        state = self.model.state_dict()
        for name in {name for tuned in self.tuned for name in tuned}:
            state[name].copy_(changed.get(name, self.base[name]))
        return self.model
