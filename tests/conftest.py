"""Tiny bases and batches for the tests: built in the process, nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tiny import MARKER
from tiny_models import BUILDERS, CLASSES, IMAGE_TOKEN, randomise

torch.set_num_threads(1)

METHODS = Path(__file__).resolve().parents[1] / "methods"


LONG = {
    "slurm": "a real SLURM on this machine (CONTRIBUTING, 'Long tests'): pytest --slurm",
    "long": "many whole runs (CONTRIBUTING, 'Long tests'): pytest --long",
}


LONGEST = "test_workflow.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    for name, help in LONG.items():
        parser.addoption(f"--{name}", action="store_true", help=f"run the tests that need {help}")
    parser.addoption("--trials", type=int, default=3, help="random trials of each fault test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Long tests are run by their own options; they are not counted as skipped otherwise."""
    left_out = [
        item
        for item in items
        if any(item.get_closest_marker(name) and not config.getoption(name) for name in LONG)
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]
    # Files go whole to one of several workers: the longest last would leave the others idle.
    items.sort(key=lambda item: item.path.name != LONGEST)


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> int:
    """How many random trials a fault test makes: few by default, hundreds with --trials."""
    return request.config.getoption("trials")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., nn.Module]:
    """make_model("llama" | "llava" | "roberta", dtype) -> a fresh deep copy of a tiny base."""
    originals: dict[str, nn.Module] = {}

    def make(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        if kind not in originals:
            originals[kind] = randomise(BUILDERS[kind]())
        return copy.deepcopy(originals[kind]).to(dtype)

    return make


@pytest.fixture(scope="session")
def make_batches() -> Callable[..., list[dict[str, Tensor]]]:
    """make_batches(kind, count, dtype, size) -> batches with labels on the second half only.

    The encoder's have a class a row, at the second place.
    """

    def make(
        kind: str, count: int = 1, dtype: torch.dtype = torch.float32, size: int = 3
    ) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        found = []
        for _ in range(count):
            ids = torch.randint(1, IMAGE_TOKEN, (size, 10), generator=generator)
            batch = {"attention_mask": torch.ones_like(ids)}
            if kind == "llava":
                ids[:, :4] = IMAGE_TOKEN
                pixels = torch.randn(size, 3, 16, 16, generator=generator)
                batch["pixel_values"] = pixels.to(dtype)
            ids[:, 4] = MARKER[0]
            labels = ids.clone()
            labels[:, :5] = -100
            if kind == "roberta":
                labels[:] = -100
                labels[:, 1] = ids[:, 1] % CLASSES
            found.append({"input_ids": ids, "labels": labels, **batch})
        return found

    return make
