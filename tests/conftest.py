"""Tiny bases and batches for the tests: built in the process, nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    RobertaConfig,
    RobertaForMaskedLM,
    SiglipVisionConfig,
)

from ballast.encoders import add_head
from tiny import MARKER

torch.set_num_threads(1)

VOCABULARY = 64
IMAGE_TOKEN = 63
CLASSES = 3  # of the tiny encoder's head
METHODS = Path(__file__).resolve().parents[1] / "methods"


LONG = {
    "slurm": "a real SLURM on this machine (CONTRIBUTING, 'Long tests'): pytest --slurm",
    "long": "many whole runs (CONTRIBUTING, 'Long tests'): pytest --long",
}


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


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> int:
    """How many random trials a fault test makes: few by default, hundreds with --trials."""
    return request.config.getoption("trials")


def _randomise(model: nn.Module) -> nn.Module:
    """Random non-zero values everywhere, norms and biases included, so that nothing is a no-op."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.15 * noise)
    return model.eval()


def _llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _llava() -> nn.Module:
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    text = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def _roberta() -> nn.Module:
    """An encoder with a classification head, so that its batches have one class a row."""
    config = RobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=66,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    model = RobertaForMaskedLM(config)
    add_head(model, {"task": CLASSES}, seed=0)
    return model


BUILDERS = {"llama": _llama, "llava": _llava, "roberta": _roberta}


@pytest.fixture(scope="session")
def make_model() -> Callable[..., nn.Module]:
    """make_model("llama" | "llava" | "roberta", dtype) -> a fresh deep copy of a tiny base."""
    originals: dict[str, nn.Module] = {}

    def make(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        if kind not in originals:
            originals[kind] = _randomise(BUILDERS[kind]())
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
