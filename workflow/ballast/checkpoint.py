"""Checkpoints of a training cell: one safetensors file with a checksum, replaced atomically.

Only safetensors and JSON are read back; nothing is unpickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ballast.errors import Damaged
from ballast.files import set_aside
from ballast.tensorfile import read_tensors, write_tensors

ADAPTER, MOMENTS, RANDOM = "adapter/", "optimiser/", "random/"


@dataclass
class Checkpoint:
    """A stored moment of training.

    Method tensors, optimiser and random states, steps done, and what was measured in them: the
    fields of `ballast.training.Outcome`.
    """

    tensors: dict[str, Tensor]
    moments: dict[str, Tensor]
    random: dict[str, Tensor]
    step: int
    measured: dict[str, Any]

    def restore_optimiser(self, optimiser: torch.optim.Optimizer) -> None:
        """Fill the state of an optimiser that was built from the same groups."""
        for name, parameter in _named(optimiser).items():
            prefix = f"{name}//"
            found = {
                key.removeprefix(prefix): value
                for key, value in self.moments.items()
                if key.startswith(prefix)
            }
            if found:
                optimiser.state[parameter] = {
                    # AdamW keeps its step count on the CPU whatever the parameter's device.
                    key: value if key == "step" else value.to(parameter.device)
                    for key, value in found.items()
                }

    def restore_random(self, generator: torch.Generator) -> None:
        """Put the global CPU and GPU generators and the method's own back."""
        torch.set_rng_state(self.random["cpu"])
        generator.set_state(self.random["method"])
        if "cuda" in self.random and torch.cuda.is_available():
            torch.cuda.set_rng_state(self.random["cuda"])


def _named(optimiser: torch.optim.Optimizer) -> dict[str, torch.nn.Parameter]:
    return {
        name: parameter
        for group in optimiser.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def write_checkpoint(
    path: Path,
    tensors: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    step: int,
    measured: dict[str, Any],
    generator: torch.Generator,
) -> None:
    """Write the state after `step` steps in place of the one before."""
    stored = {ADAPTER + key: value for key, value in tensors.items()}
    for name, parameter in _named(optimiser).items():
        for key, value in optimiser.state.get(parameter, {}).items():
            stored[f"{MOMENTS}{name}//{key}"] = torch.as_tensor(value).detach().cpu()
    stored[RANDOM + "cpu"] = torch.get_rng_state()
    stored[RANDOM + "method"] = generator.get_state()
    if torch.cuda.is_available():
        stored[RANDOM + "cuda"] = torch.cuda.get_rng_state()
    write_tensors(path, stored, {"step": step, "measured": measured})


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The stored checkpoint, or None if there is none that is whole.

    A damaged one is set aside as `*.damaged`, and training starts from the beginning.
    """
    if not path.exists():
        return None
    try:
        everything, about = read_tensors(path)
    except Damaged:
        set_aside(path)
        return None

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in everything.items() if k.startswith(prefix)}

    return Checkpoint(
        part(ADAPTER),
        part(MOMENTS),
        part(RANDOM),
        about["step"],
        about["measured"],
    )
