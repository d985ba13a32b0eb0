"""What a transformers configuration says about a network: its shapes and its parameter count.

Counted from config.json alone, without torch. Decoders of the Llama kind, encoders of BERT's kind
and Llava models of these are known; `network` raises DataError for any other model type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ballast.errors import DataError

Config = Mapping[str, Any]

# What a configuration leaves out where it is the class's own default.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
              "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048,
              "tie_word_embeddings": False},
    "mistral": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
                "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                "max_position_embeddings": 131072, "tie_word_embeddings": False},
    "qwen2": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
              "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
              "max_position_embeddings": 32768, "tie_word_embeddings": False},
    "qwen3": {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 22016,
              "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
              "head_dim": 128, "max_position_embeddings": 32768, "tie_word_embeddings": False},
    "bert": {"vocab_size": 30522, "hidden_size": 768, "intermediate_size": 3072,
             "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512,
             "type_vocab_size": 2, "tie_word_embeddings": True},
    "roberta": {"vocab_size": 50265, "hidden_size": 768, "intermediate_size": 3072,
                "num_hidden_layers": 12, "num_attention_heads": 12, "max_position_embeddings": 512,
                "type_vocab_size": 2, "tie_word_embeddings": True},
    "siglip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                            "num_attention_heads": 12, "num_channels": 3, "image_size": 224,
                            "patch_size": 16, "vision_use_head": True},
    "clip_vision_model": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                          "num_attention_heads": 12, "num_channels": 3, "image_size": 224,
                          "patch_size": 32},
}  # fmt: skip

# The networks of the bases that are pretrained here, before there is a file of theirs.
WORLDS: dict[str, dict[str, Any]] = {
    "micro-lm": {"model_type": "llama", "vocab_size": 206, "hidden_size": 96,
                 "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "max_position_embeddings": 64, "tie_word_embeddings": True},
    "micro-encoder": {"model_type": "roberta", "vocab_size": 205, "hidden_size": 128,
                      "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4,
                      "max_position_embeddings": 66, "type_vocab_size": 1},
    "micro-vlm": {"model_type": "llava", "vision_feature_select_strategy": "full",
                  "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 128,
                                    "intermediate_size": 256, "num_hidden_layers": 2,
                                    "num_attention_heads": 4, "image_size": 32, "patch_size": 16,
                                    "vision_use_head": False},
                  "text_config": {"model_type": "qwen2", "vocab_size": 94, "hidden_size": 128,
                                  "intermediate_size": 256, "num_hidden_layers": 3,
                                  "num_attention_heads": 4, "num_key_value_heads": 4,
                                  "max_position_embeddings": 64}},
}  # fmt: skip


@dataclass(frozen=True)
class Stack:
    """A stack of equal transformer layers.

    linear: (out, in) of each weight matrix of one layer, by its leaf name; other: the parameters
    of a layer that stand in no such matrix (biases, norms).
    """

    layers: int
    width: int
    inner: int
    heads: int
    linear: dict[str, tuple[int, int]]
    other: int

    @property
    def matrices(self) -> int:
        """Parameters of the weight matrices of all layers."""
        return self.layers * sum(m * n for m, n in self.linear.values())

    @property
    def parameters(self) -> int:
        return self.matrices + self.layers * self.other


@dataclass(frozen=True)
class Network:
    """A base's network: its decoder or encoder, and what stands around it."""

    kind: str  # causal, masked, or vision (a decoder that is shown images)
    stack: Stack
    vocabulary: int
    positions: int
    tied: bool
    rest: int  # parameters outside layers, embeddings and head: positions, norms, head transform
    tower: Stack | None = None
    tower_rest: int = 0
    connector: dict[str, tuple[int, int]] | None = None
    connector_bias: int = 0
    image_tokens: int = 0

    @property
    def embeddings(self) -> int:
        return self.vocabulary * self.stack.width

    @property
    def connector_parameters(self) -> int:
        return sum(m * n for m, n in (self.connector or {}).values()) + self.connector_bias

    @property
    def tower_parameters(self) -> int:
        return (self.tower.parameters if self.tower else 0) + self.tower_rest

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        words = self.embeddings * (1 if self.tied else 2)
        seen = self.tower_parameters + self.connector_parameters
        return self.stack.parameters + words + self.rest + seen


def network(config: Config) -> Network:
    """The network that a config.json describes. Raises DataError for an unknown model type."""
    kind = config.get("model_type", "")
    known: dict[str, Callable[[Config], Network]] = {
        **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _decoder),
        **dict.fromkeys(("bert", "roberta"), _encoder),
        "llava": _llava,
    }
    if kind not in known:
        raise DataError(f"model type {kind!r}; counted from its configuration: {', '.join(known)}")
    return known[kind](config)


def _filled(config: Config) -> dict[str, Any]:
    given = {key: value for key, value in config.items() if value is not None}
    return DEFAULTS[config["model_type"]] | given


def _decoder(config: Config) -> Network:
    c = _filled(config)
    kind, width, inner, heads = (
        c["model_type"], c["hidden_size"], c["intermediate_size"], c["num_attention_heads"],
    )  # fmt: skip
    size = c.get("head_dim", width // heads)
    queries, keys = heads * size, c.get("num_key_value_heads", heads) * size
    linear = {
        "q_proj": (queries, width),
        "k_proj": (keys, width),
        "v_proj": (keys, width),
        "o_proj": (width, queries),
        "gate_proj": (inner, width),
        "up_proj": (inner, width),
        "down_proj": (width, inner),
    }
    other = 2 * width
    if kind == "qwen2" or c.get("attention_bias"):
        other += queries + 2 * keys + (0 if kind == "qwen2" else width)
    if c.get("mlp_bias"):
        other += 2 * inner + width
    if kind == "qwen3":
        other += 2 * size
    stack = Stack(c["num_hidden_layers"], width, inner, heads, linear, other)
    tied = bool(c["tie_word_embeddings"])
    return Network("causal", stack, c["vocab_size"], c["max_position_embeddings"], tied, width)


def _plain_layer(width: int, inner: int) -> tuple[dict[str, tuple[int, int]], int]:
    """Matrices, and all other parameters, of a layer with biases, two layer norms and no gate."""
    linear = dict.fromkeys(("query", "key", "value", "out"), (width, width))
    linear |= {"up": (inner, width), "down": (width, inner)}
    return linear, sum(m for m, _ in linear.values()) + 4 * width


def _encoder(config: Config) -> Network:
    c = _filled(config)
    width, words = c["hidden_size"], c["vocab_size"]
    linear, other = _plain_layer(width, c["intermediate_size"])
    stack = Stack(
        c["num_hidden_layers"], width, c["intermediate_size"], c["num_attention_heads"], linear,
        other,
    )  # fmt: skip
    positions = c["max_position_embeddings"]
    embedded = (positions + c["type_vocab_size"]) * width + 2 * width
    head = width * width + width + 2 * width + words  # transform, its norm, a bias for every word
    tied = bool(c["tie_word_embeddings"])
    return Network("masked", stack, words, positions, tied, embedded + head)


def _tower(config: Config) -> tuple[Stack, int, int]:
    """A vision tower's layers, its other parameters, and the patches of a picture."""
    c = _filled(config)
    width, inner, patch = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    linear, other = _plain_layer(width, inner)
    stack = Stack(c["num_hidden_layers"], width, inner, c["num_attention_heads"], linear, other)
    patches = (c["image_size"] // patch) ** 2
    rest = c["num_channels"] * patch**2 * width + patches * width + 2 * width
    if c["model_type"] == "clip_vision_model":
        rest += 2 * width + 2 * width  # class token and its position; norm before the layers
        patches += 1
    else:
        rest += width  # bias of the patches' projection
        if c["vision_use_head"]:
            attention = 4 * width * width + 4 * width
            rest += width + attention + 2 * width + 2 * width * inner + inner + width
    return stack, rest, patches


def _llava(config: Config) -> Network:
    text = {"model_type": "llama"} | dict(config["text_config"])
    vision = {"model_type": "clip_vision_model"} | dict(config["vision_config"])
    if vision["model_type"] not in ("siglip_vision_model", "clip_vision_model"):
        raise DataError(f"vision tower of type {vision['model_type']!r} is not known")
    inner = network(text)
    tower, rest, patches = _tower(vision)
    layers = config.get("vision_feature_layer", -2)
    taken = tower.width * (len(layers) if isinstance(layers, list) else 1)
    width = inner.stack.width
    default = config.get("vision_feature_select_strategy", "default") == "default"
    return Network(
        "vision",
        inner.stack,
        inner.vocabulary,
        inner.positions,
        bool(config.get("tie_word_embeddings", False)),
        inner.rest,
        tower,
        rest,
        {"linear_1": (width, taken), "linear_2": (width, width)},
        2 * width if config.get("multimodal_projector_bias", True) else 0,
        patches - 1 if default else patches,
    )
