"""A base in miniature: as many layers, every width divided, random weights; it runs in no time.

A small base is its own miniature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ballast.forecast.architecture import DEFAULTS, Network, network

# A base with no more parameters in its layers is taken as it is.
SMALL = 1.5e6
# The least of a miniature's widths, and of the residual stream's.
LEAST, LEAST_HIDDEN = 16, 32
# Room for the few tokens that a miniature reads.
POSITIONS = 64


def scale_of(config: dict[str, Any]) -> int:
    """What the widths of a base may be divided by, a power of two; 1 for a small base."""
    made = network(config)
    if made.stack.parameters <= SMALL:
        return 1
    return max(1, 2 ** min(_halvings(_narrowest(made), LEAST),
                           _halvings(made.stack.width, LEAST_HIDDEN)))  # fmt: skip


def _narrowest(made: Network) -> int:
    return min(side for shape in made.stack.linear.values() for side in shape)


def _halvings(width: int, least: int) -> int:
    return max(0, (width // least).bit_length() - 1)


def shrunk(config: dict[str, Any], scale: int) -> dict[str, Any]:
    """The configuration of a base with every width divided by `scale`.

    A vision-language model's last word stands for images.
    """
    if config["model_type"] != "llava":
        return config if scale == 1 else _shrunk_text(config, scale)
    text = {"model_type": "llama"} | dict(config["text_config"])
    text = text if scale == 1 else _shrunk_text(text, scale)
    vision = {"model_type": "clip_vision_model"} | dict(config["vision_config"])
    words = (DEFAULTS[text["model_type"]] | text)["vocab_size"]
    return config | {
        "text_config": text,
        "vision_config": _shrunk_tower(vision, scale),
        "image_token_index": words - 1,
    }


def _shrunk_text(config: dict[str, Any], scale: int) -> dict[str, Any]:
    given = {key: value for key, value in config.items() if value is not None}
    c = DEFAULTS[config["model_type"]] | given
    heads = c["num_attention_heads"]
    groups = c.get("num_key_value_heads", heads)
    size = c.get("head_dim", c["hidden_size"] // heads)
    made = c | {
        "vocab_size": max(2 * POSITIONS, c["vocab_size"] // scale),
        "hidden_size": _even(c["hidden_size"] / scale),
        "intermediate_size": _even(c["intermediate_size"] / scale),
        "num_attention_heads": heads // groups,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    if config["model_type"] not in ("bert", "roberta"):
        # All heads of the keys as one: its rotations need an even width.
        made |= {"num_key_value_heads": 1, "head_dim": _even(groups * size / scale)}
    return made


def _shrunk_tower(config: dict[str, Any], scale: int) -> dict[str, Any]:
    """Of one layer and one patch: cells hold no tower, only its width counts."""
    c = DEFAULTS[config["model_type"]] | config
    return c | {
        "hidden_size": _even(c["hidden_size"] / scale),
        "intermediate_size": _even(c["intermediate_size"] / scale),
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": c["patch_size"],
    }


def _even(width: float) -> int:
    return max(2, 2 * round(width / 2))


def model_of(config: dict[str, Any], device: str = "cpu") -> nn.Module:
    """The model of a config.json, with random weights; on `meta` without memory for them."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMaskedLM,
    )

    from ballast.models import is_encoder

    settings = dict(config)
    made = AutoConfig.for_model(settings.pop("model_type"), **settings)
    made.architectures = config.get("architectures")
    if hasattr(made, "vision_config"):
        kind = AutoModelForImageTextToText
    else:
        kind = AutoModelForMaskedLM if is_encoder(made) else AutoModelForCausalLM
    with torch.device(device):
        return kind.from_config(made)
