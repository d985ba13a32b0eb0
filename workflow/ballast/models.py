"""Loading a base as every transformers model is loaded: by the Auto classes, from a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ballast.anatomy import Anatomy, anatomy_of
from ballast.errors import DataError
from ballast.escape import one_line, shorten
from ballast.faults import fault_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Base:
    """A loaded base: model, tokenizer, processor (None for text), anatomy."""

    model: nn.Module
    tokenizer: Any
    processor: Any
    anatomy: Anatomy

    @property
    def multimodal(self) -> bool:
        return self.processor is not None


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device. Raises DataError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DataError("device: cuda, but torch sees no GPU; use device: auto or cpu")
    return torch.device(name)


def load_base(folder: Path, precision: str = "fp32", device: str = "cpu") -> Base:
    """Load a base from a transformers folder; safetensors only, no remote code.

    An encoder is loaded with its masked-LM head; `encoders.add_head` gives it one for classes.
    Raises DataError if the folder is not a causal, a masked or an image-text-to-text model, or one
    that transformers cannot load without code from the folder.
    """
    try:
        return _loaded(folder, precision, device)
    except (DataError, RuntimeError, MemoryError):  # memory that a larger limit may give
        raise
    except Exception as error:
        if fault_of(error) is not None:
            raise
        raise DataError(
            f"{folder}: transformers cannot load it (code in the folder is never run): "
            f"{type(error).__name__}: {shorten(one_line(str(error)), 300)}"
        ) from error


def _loaded(folder: Path, precision: str, device: str) -> Base:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    options = {
        "dtype": DTYPES[precision],
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    if hasattr(config, "vision_config"):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if config.model_type != "llava":
            raise DataError(
                f"{folder.name}: model type {config.model_type!r}; of the vision-language models "
                "those of type llava are supported"
            )
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        tokenizer = processor.tokenizer
        if not tokenizer.chat_template:
            tokenizer.chat_template = processor.chat_template
        model = AutoModelForImageTextToText.from_pretrained(folder, **options)
    elif is_encoder(config):
        processor = None
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = _masked_model(folder, options)
    else:
        processor = None
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.to(pick_device(device)).eval()
    return Base(model, tokenizer, processor, anatomy_of(model))


def is_encoder(config: Any) -> bool:
    """Whether a model's configuration is a masked language model's, and no decoder's.

    Where it names no architecture, its type has to be one that transformers knows as masked only.
    """
    from transformers.models.auto import modeling_auto as auto

    if getattr(config, "is_decoder", False):
        return False
    if config.architectures:
        return any(name.endswith("ForMaskedLM") for name in config.architectures)
    kind = config.model_type
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and kind not in causal


def _masked_model(folder: Path, options: dict[str, Any]) -> nn.Module:
    """An encoder with the masked-LM head that it was pretrained with.

    Raises DataError if the folder lacks weights, of that head for one: filled with random numbers,
    it could not show what tuning forgets.
    """
    from transformers import AutoModelForMaskedLM

    model, found = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True, **options)
    missing = sorted(found["missing_keys"])
    if missing:
        raise DataError(
            f"{folder.name}: no weights for {', '.join(missing[:3])}; an encoder is needed with "
            "the masked-LM head of its pretraining"
        )
    return model


class FeatureTower(nn.Module):
    """Stands in for a frozen vision tower: takes its stored features for `pixel_values`.

    Input and output [images, tokens, width]; whichever hidden layer the model selects, it gets the
    layer that was stored, so the rest of the model runs unchanged.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        layers = self.config.num_hidden_layers + 1
        return _Output(last_hidden_state=pixel_values, hidden_states=(pixel_values,) * layers)


class _Output(SimpleNamespace):
    """The fields of a vision tower's output that image-text-to-text models read."""

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


@torch.no_grad()
def tower_features(base: Base, images: list[Any], batch: int = 64) -> Tensor:
    """Features that the language side reads of each image: [images, tokens, width], on the CPU.

    They are the hidden layer and the tokens that the model's own configuration selects, before the
    connector.
    """
    model, config = base.model, base.model.config
    tower = model.get_submodule(base.anatomy.tower)
    found = []
    for start in range(0, len(images), batch):
        pixels = base.processor.image_processor(images[start : start + batch], return_tensors="pt")
        pixels = pixels["pixel_values"].to(model.device, model.dtype)
        states = tower(pixels, output_hidden_states=True).hidden_states
        chosen = states[config.vision_feature_layer]
        if config.vision_feature_select_strategy == "default":
            chosen = chosen[:, 1:]
        found.append(chosen.cpu())
    return torch.cat(found)


def use_stored_features(base: Base) -> None:
    """Replace the base's vision tower by `FeatureTower`; its parameters leave the memory."""
    config = base.model.config
    parent, _, leaf = base.anatomy.tower.rpartition(".")
    tower = FeatureTower(config.vision_config, base.model.dtype)
    setattr(base.model.get_submodule(parent), leaf, tower)
    # The class token was dropped when the features were stored; nothing is left to drop.
    config.vision_feature_select_strategy = "full"
