"""Soft prompts and prefixes: keys and values that stand in front inside attention.

In a causal decoder a soft token that stands first depends on nothing that follows. A soft prompt of
P embeddings is therefore one pair of keys and values [P, ...] per layer, the same for every example
and every decoding step. It is computed by running the P embeddings alone through the frozen decoder
at positions -P .. -1 (with gradient in training; kept between evaluation forwards) and is put in
front of every layer's keys and values inside attention. Against prepending the embeddings to every
example this costs P tokens per forward in place of P per example, and touches no input: position
ids, attention masks, caches, labels and logits keep their lengths. RoPE knows only differences of
positions, so that the numbers are those of the P embeddings prepended literally and all positions
counted from the prompt's first.

Prefix tuning learns these keys and values themselves.

The pairs travel to attention as a keyword argument of the decoder's own forward (`kv_prefix`),
which transformers' models hand through to the attention interface; so nothing is stored in the
model while it runs, and a layer that is checkpointed computes the same again. Attention then is
torch's SDPA, whichever the base was loaded with. A prefix stays in sight of sliding windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ballast.adapters import Adapter, adapter_dtype
from ballast.context import Context
from ballast.errors import SuiteError

ATTENTION = "ballast_prefix"
MODULE = "soft_prefix"


class Prefix:
    """What stands in front of a batch.

    pairs: keys and values [1 or batch, key/value heads, P, head width] of each attention module;
    visible: which query sees which of them, bool [batch, queries, P], or None where each sees all.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], visible: Tensor | None = None):
        self.pairs, self.visible = pairs, visible
        self._masks: dict[int, tuple[Tensor, Tensor]] = {}

    def mask(self, own: Tensor | None) -> Tensor | None:
        """The model's mask [batch, heads or 1, queries, keys] with the prefix's columns in front.

        Every layer asks with the same tensor, so that the wider mask is made once per forward.
        """
        if own is None:
            return None
        if id(own) not in self._masks:
            if self.visible is None:
                # A mask that is not bool is added to the scores.
                seen = True if own.dtype == torch.bool else 0.0
                wide = F.pad(own, (self.pairs[0][0].shape[2], 0), value=seen)
            else:
                front = self.visible[:, None].expand(*own.shape[:-1], -1)
                wide = torch.cat((front, own), -1)
            self._masks[id(own)] = own, wide  # held, so that its id stays its own
        return self._masks[id(own)][1]


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    kv_prefix: Prefix | None = None,
    kv_made: dict[int, tuple[Tensor, Tensor]] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """SDPA with a prefix in front; or, with `kv_made`, one that notes keys and values by module."""
    if kv_made is not None:
        kv_made[module.prefix_index] = key, value
    if kv_prefix is not None:
        keys, values = kv_prefix.pairs[module.prefix_index]
        batch = (len(key), -1, -1, -1)
        key = torch.cat((keys.to(key.dtype).expand(batch), key), 2)
        value = torch.cat((values.to(value.dtype).expand(batch), value), 2)
        attention_mask = kv_prefix.mask(attention_mask)
        options["is_causal"] = False  # the mask says it; without one, everything is seen
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def always_a_mask(*args: Any, allow_is_causal_skip: bool = True, **options: Any) -> Tensor | None:
    """SDPA's mask, made even where SDPA's own causal flag would do: it knows of no prefix."""
    return sdpa_mask(*args, allow_is_causal_skip=False, **options)


AttentionInterface.register(ATTENTION, prefix_attention)
AttentionMaskInterface.register(ATTENTION, always_a_mask)


def keys_and_values(
    decoder: nn.Module, embeddings: Tensor, positions: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that `embeddings` [batch, P, width] have alone, per attention module.

    positions: their position ids [1, P], or None for the model's own count.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}
    # `forward` itself: a call would run the hook that puts a prefix in front.
    decoder.forward(
        inputs_embeds=embeddings.to(decoder.get_input_embeddings().weight.dtype),
        attention_mask=embeddings.new_ones(embeddings.shape[:2], dtype=torch.long),
        position_ids=positions,
        use_cache=False,
        kv_made=made,
    )
    return [made[index] for index in sorted(made)]


def in_front(tokens: int, device: torch.device) -> Tensor:
    """Position ids [1, P] of a prompt that stands before position 0."""
    return torch.arange(-tokens, 0, device=device)[None]


class SoftPrefix(Adapter):
    """A module of the decoder that puts a prefix in front of what the decoder reads.

    A subclass gives `prefix`. What it gives in evaluation is kept until a parameter is written or
    the mode changes: versions alone do not tell, a fused optimiser's step leaves them as they are.
    """

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self._kept: tuple[tuple[Any, ...], Prefix] | None = None

    def prefix(self, decoder: nn.Module) -> Prefix:
        """The prefix of every batch."""
        raise NotImplementedError

    def put_in_front(
        self, decoder: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The decoder's forward pre-hook."""
        return args, inputs | {"kv_prefix": self._current(decoder)}

    def _current(self, decoder: nn.Module) -> Prefix:
        if self.training or torch.is_grad_enabled():
            return self.prefix(decoder)
        parameters = list(self.parameters())
        device = parameters[0].device.type
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        kind = (*(p._version for p in parameters), parameters[0].device, autocast)
        if self._kept is None or self._kept[0] != kind:
            self._kept = kind, self.prefix(decoder)
        # A wider mask belongs to one forward.
        return Prefix(self._kept[1].pairs)

    def train(self, mode: bool = True) -> SoftPrefix:
        self._kept = None
        return super().train(mode)


class SoftPrompt(SoftPrefix):
    """P embeddings in front of a causal decoder; `prompt` [P, width] trains."""

    def __init__(self, tokens: int, width: int, like: Tensor) -> None:
        super().__init__()
        self.prompt = parameter((tokens, width), like)

    def embeddings(self) -> Tensor:
        """What runs through the decoder, [1, P, the decoder's width]."""
        return self.prompt[None]

    def prefix(self, decoder: nn.Module) -> Prefix:
        embeddings = self.embeddings()
        positions = in_front(embeddings.shape[1], embeddings.device)
        return Prefix(keys_and_values(decoder, embeddings, positions))


def parameter(shape: Sequence[int], like: Tensor) -> nn.Parameter:
    """Zeros that train, on `like`'s device at an adapter's precision."""
    kind = {"dtype": adapter_dtype(like), "device": like.device}
    return nn.Parameter(torch.zeros(*shape, **kind))


def decoder_of(ctx: Context) -> nn.Module:
    """The language model: what reads embeddings and gives hidden states."""
    return ctx.model.get_submodule(ctx.anatomy.language_model)


def attach_prefix(ctx: Context, module: SoftPrefix) -> None:
    """Put `module` into the language model, in front of whatever it reads.

    Raises SuiteError where the connector is to be adapted, and for architectures whose attention
    takes no implementation from outside.
    """
    if ctx.connector == "adapted":
        raise SuiteError(
            "connector: adapted, but a prompt has nothing to put there; use tuned or frozen"
        )
    decoder = decoder_of(ctx)
    if not getattr(decoder, "_supports_attention_backend", False):
        raise SuiteError(
            f"{type(decoder).__name__}: its attention takes no implementation from outside, so "
            "that no prefix can be put in front; use another method, or a base such as Llama, "
            "Qwen2, Mistral or RoBERTa"
        )
    for index, name in enumerate(attention_names(ctx)):
        ctx.model.get_submodule(name).prefix_index = index
    decoder.config._attn_implementation = ATTENTION
    ctx.replace(f"{ctx.anatomy.language_model}.{MODULE}", module)
    decoder.register_forward_pre_hook(module.put_in_front, with_kwargs=True)


def attention_names(ctx: Context) -> list[str]:
    """Names of the attention modules, from the input to the output: those that hold a query."""
    linears = ctx.anatomy.linears(ctx.model, ctx.anatomy.layers, None)
    return [name.rpartition(".")[0] for name in linears if ctx.anatomy.role(name) == "q"]


def soft_prefix(ctx: Context) -> Any:
    """The module that `attach_prefix` put in place."""
    return decoder_of(ctx).get_submodule(MODULE)


def embedding_width(ctx: Context) -> int:
    return ctx.model.get_input_embeddings().weight.shape[1]


def sampled_words(ctx: Context, tokens: int) -> Tensor:
    """Embeddings [P, width] of words drawn from the vocabulary, each at most once if it suffices.

    Drawn as PEFT's SAMPLE_VOCAB from the whole vocabulary; Lester et al. draw from its 5,000 most
    common words.
    """
    weight = ctx.model.get_input_embeddings().weight.detach()
    order = torch.randperm(len(weight), generator=ctx.generator)
    chosen = order[torch.arange(tokens) % len(order)]
    return weight[chosen.to(weight.device)]


def random_uniform(like: Tensor, bound: float, generator: torch.Generator) -> Tensor:
    """Uniform in +-bound, of `like`'s shape and kind, drawn on the CPU."""
    drawn = torch.rand(like.shape, generator=generator, dtype=like.dtype)
    return ((2 * drawn - 1) * bound).to(like.device)


def random_normal(like: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Normal with mean 0, of `like`'s shape and kind, drawn on the CPU."""
    drawn = torch.randn(like.shape, generator=generator, dtype=like.dtype)
    return (drawn * deviation).to(like.device)


@torch.no_grad()
def start_linear(weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
    """torch's own start of a linear layer: weight [m, n] and bias [m] uniform in +-1/sqrt(n)."""
    bound = weight.shape[1] ** -0.5
    weight.copy_(random_uniform(weight, bound, generator))
    bias.copy_(random_uniform(bias, bound, generator))
