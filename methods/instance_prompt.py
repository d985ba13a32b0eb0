"""Instance-conditioned prompt: soft tokens that a small network shifts by what the example shows.

    prompt_i = P + meta(f_i) (added to every token),   P [tokens, d],   meta(f) = W2 relu(W1 f)
    W1 [d / reduction, d], W2 [d, d / reduction], both with bias                         (CoCoOp)

f_i, scaled to length 1 as there, is the mean of what the connector gives for the example's image
(vision-language), or of the embeddings of its question (text; IDPG, Wu et al., arXiv:2204.04497,
encodes the sentence with a second model or by word vectors). An example without image, or a text
that has no question, gets P alone.

The question ends where `response_marker` first stands, so that nothing of a response is in f_i. Nor
may f_i tell the first words of a question what the last ones are: those would otherwise be scored
by a model that has read them. In text, P therefore stands in front of the question, and P +
meta(f_i) in front of everything from the marker's last token on, which is where the response is
predicted. An image is known before any text: there the shifted prompt stands in front of
everything, as in CoCoOp. Both are keys and values in front (`ballast.prompts`), here per example,
so that they cost tokens x examples per forward; generation computes them in its first pass only.

CoCoOp starts P at the words "a photo of a" (init: sampled takes words of the vocabulary) or normal
with deviation 0.02 (random); meta starts as torch starts linear layers. Its encoders are CLIP's.

Trainable: tokens d + (h d + h) + (d h + d), h = max(1, d // reduction).

Small bases: in config/all-methods.yaml no rate from 0.009 to 0.27 learns more than the form of the
answers (micro-lm: 12.2 to 3.5 nats per token, 2 % exact); see `prompt_tuning` for the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.prompts import (
    Prefix,
    SoftPrompt,
    attach_prefix,
    embedding_width,
    in_front,
    keys_and_values,
    parameter,
    random_normal,
    sampled_words,
    soft_prefix,
    start_linear,
)

declaration = Declaration(
    title="Instance-conditioned prompt",
    citation="Zhou et al., Conditional Prompt Learning for Vision-Language Models (CoCoOp), "
    "CVPR 2022, arXiv:2203.05557",
    family="additive",
    merges=False,
    unchanged_at_start=False,
    random_start=True,
    learning_rate=2e-3,
    learning_rate_source="the paper's, SGD, CLIP",
    applies_to=("text", "vision-language"),
    size="tokens",
)


@dataclass(frozen=True)
class Hyper:
    tokens: int = hyper(4, "context length of CoCoOp", low=1)
    reduction: int = hyper(16, "the meta-net's bottleneck is 16 times narrower (CoCoOp)", low=1)
    init: str = hyper("sampled", "words, as CoCoOp's", choices=("sampled", "random"))


class InstancePrompt(SoftPrompt):
    """P and the meta-net; `marker`: the tokens after a text's question, None where images tell."""

    def __init__(self, tokens: int, width: int, hidden: int, like: Tensor) -> None:
        super().__init__(tokens, width, like)
        self.w1, self.b1 = parameter((hidden, width), like), parameter((hidden,), like)
        self.w2, self.b2 = parameter((width, hidden), like), parameter((width,), like)
        self.marker: tuple[int, ...] | None = None
        self._images: Tensor | None = None

    def shifted(self, features: Tensor) -> Tensor:
        """P + meta(f), [batch, tokens, width], of features [batch, width]."""
        f = F.normalize(features.to(self.w1.dtype), dim=-1)
        shift = F.linear(F.relu(F.linear(f, self.w1, self.b1)), self.w2, self.b2)
        return self.prompt + shift[:, None]

    def begin(self, _: nn.Module, __: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        """The model's forward pre-hook: no image but those that `generate` has looked at before."""
        outputs = (inputs.get("mm_encoder_outputs") or {}).get("image")
        self._images = None
        if outputs is not None:
            self._images = torch.stack([image.mean(0) for image in outputs.pooler_output])

    def see(self, _: nn.Module, __: tuple[Any, ...], features: Tensor) -> None:
        """The connector's forward hook: mean feature of each image."""
        self._images = features.mean(1)

    def put_in_front(
        self, decoder: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """As in the parent; what the first pass computed is kept with the cache that it fills."""
        cache = inputs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            if not hasattr(cache, MEMORY):
                raise ValueError(
                    "past_key_values was not filled by this model, so that its examples' "
                    "prompts are unknown; pass the cache of the first forward"
                )
            pairs, visible = getattr(cache, MEMORY)
        else:
            pairs, visible = self._of_examples(decoder, inputs)
            if cache is None and _caches(decoder, inputs) and not self.training:
                cache = inputs["past_key_values"] = DynamicCache(config=decoder.config)
            if cache is not None:
                last = None if visible is None else visible[:, -1:]
                setattr(cache, MEMORY, (pairs, last))
        if visible is not None and visible.shape[1] == 1:
            given = inputs.get("inputs_embeds")
            length = (inputs["input_ids"] if given is None else given).shape[1]
            visible = visible.expand(-1, length, -1)
        return args, inputs | {"kv_prefix": Prefix(pairs, visible)}

    def _of_examples(
        self, decoder: nn.Module, inputs: dict[str, Any]
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """Keys and values of a fresh batch, and which query sees which of them."""
        if self.marker is not None:
            ids = inputs.get("input_ids")
            if ids is None:
                raise ValueError("an instance prompt for text needs input_ids, not inputs_embeds")
            return self._of_questions(decoder, ids, inputs.get("attention_mask"))
        images, self._images = self._images, None
        if images is None:
            return self._run(decoder, self.prompt[None]), None
        batch = len(inputs["inputs_embeds"])
        if len(images) != batch:
            raise ValueError(f"{len(images)} images for {batch} examples; one each is needed")
        return self._run(decoder, self.shifted(images)), None

    def _of_questions(
        self, decoder: nn.Module, ids: Tensor, mask: Tensor | None
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        start, end = spans(ids, self.marker)
        places = torch.arange(ids.shape[1], device=ids.device)
        inside = (places < start[:, None]) & (end[:, None] < len(places))
        if mask is not None:
            inside = inside & mask.bool()
        words = decoder.get_input_embeddings()(ids) * inside[..., None]
        features = words.sum(1) / inside.sum(1, keepdim=True).clamp_min(1)
        prompts = torch.cat((self.prompt[None], self.shifted(features)))
        both = [
            tuple(torch.cat((made[:1].expand_as(made[1:]), made[1:]), 2) for made in pair)
            for pair in self._run(decoder, prompts)
        ]
        answers = (places >= end[:, None])[..., None].expand(-1, -1, len(self.prompt))
        return both, torch.cat((~answers, answers), -1)

    def _run(self, decoder: nn.Module, prompts: Tensor) -> list[tuple[Tensor, Tensor]]:
        return keys_and_values(decoder, prompts, in_front(prompts.shape[1], prompts.device))


MEMORY = "instance_prompt"


def spans(ids: Tensor, marker: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Where the first marker of each row [batch, length] starts, and where its last token stands.

    Both are the length where there is no marker.
    """
    length, size = ids.shape[1], len(marker)
    if length < size:
        return ids.new_full((len(ids),), length), ids.new_full((len(ids),), length)
    wanted = torch.tensor(marker, device=ids.device)
    found = (ids.unfold(1, size, 1) == wanted).all(-1)
    start = torch.where(found.any(1), found.int().argmax(1), length)
    return start, torch.where(found.any(1), start + size - 1, length)


def attach(ctx: Context) -> None:
    width = embedding_width(ctx)
    like = ctx.model.get_input_embeddings().weight
    module = InstancePrompt(ctx.hyper.tokens, width, _hidden(ctx), like)
    if ctx.anatomy.connector is None:
        if not ctx.response_marker:
            raise SuiteError(
                "template: nothing stands between question and response, so that an instance "
                "prompt cannot tell the question; let the template end with words of its own, "
                "as in 'Q: {question} A:'"
            )
        module.marker = tuple(ctx.response_marker)
    attach_prefix(ctx, module)
    if ctx.anatomy.connector is not None:
        ctx.model.register_forward_pre_hook(module.begin, with_kwargs=True)
        ctx.model.get_submodule(ctx.anatomy.connector).register_forward_hook(module.see)


@torch.no_grad()
def initialise(ctx: Context) -> None:
    module = soft_prefix(ctx)
    if ctx.hyper.init == "sampled":
        module.prompt.copy_(sampled_words(ctx, len(module.prompt)))
    else:
        module.prompt.copy_(random_normal(module.prompt, 0.02, ctx.generator))
    start_linear(module.w1, module.b1, ctx.generator)
    start_linear(module.w2, module.b2, ctx.generator)


def total_parameters(ctx: Context, size: int) -> int:
    width, hidden = embedding_width(ctx), _hidden(ctx)
    return size * width + (hidden * width + hidden) + (width * hidden + width)


def _hidden(ctx: Context) -> int:
    return max(1, embedding_width(ctx) // ctx.hyper.reduction)


def _caches(decoder: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the decoder will fill a cache: as it resolves `use_cache` itself."""
    asked = inputs.get("use_cache")
    return bool(decoder.config.use_cache if asked is None else asked)
