"""Prompt tuning: P soft tokens in front of every example; everything else is frozen.

    inputs = [P ; embeddings of the example],   P [tokens, d] trains        (place: text)
    inputs = [connector(V) ; embeddings],       V [tokens, vision width]    (place: visual)

place: visual learns tokens on the other side of the frozen connector, where an image's own patches
are; it needs a vision-language base. In both places the prompt stands first, in the language model
only. How it is put there without prepending anything: see `ballast.prompts`.

init: sampled starts at real tokens, which the paper finds better but at its largest size: words of
the vocabulary (uniform over all of them as in PEFT's SAMPLE_VOCAB; the paper takes the 5,000 most
common), or, for visual, patch features of the training images, which is our counterpart. init:
random is the paper's uniform +-0.5. The paper optimises by Adafactor without schedule; here it is
the suite's optimiser. Outputs and gradients are those of PEFT's PROMPT_TUNING. Trainable: tokens
times the width.

Small bases: in config/all-methods.yaml (0.4 M parameters, 200 steps) no rate from 0.03 to 0.3
learns more than the form of the answers (micro-lm: 12.2 to 2.7 nats per token, 3 % exact). That is
the method's nature: in the paper prompts catch up with tuning at 10^10 parameters, in 30,000 steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.prompts import (
    SoftPrompt,
    attach_prefix,
    embedding_width,
    random_uniform,
    sampled_words,
    soft_prefix,
)

declaration = Declaration(
    title="Prompt tuning",
    citation="Lester, Al-Rfou and Constant, The Power of Scale for Parameter-Efficient Prompt "
    "Tuning, EMNLP 2021, arXiv:2104.08691",
    family="additive",
    merges=False,
    unchanged_at_start=False,
    random_start=True,
    learning_rate=0.3,
    learning_rate_source="the paper's, T5 with Adafactor",
    applies_to=("text", "vision-language"),
    size="tokens",
)


@dataclass(frozen=True)
class Hyper:
    tokens: int = hyper(
        100, "prompt length of the paper's default; from 20 on it gains little", low=1
    )
    place: str = hyper(
        "text", "the paper's; visual is VPT's idea at the connector", choices=("text", "visual")
    )
    init: str = hyper("sampled", "sampled vocabulary (paper, 3.2)", choices=("sampled", "random"))


class VisualPrompt(SoftPrompt):
    """Vectors of the vision tower's width that pass through the connector."""

    def __init__(self, tokens: int, width: int, like: Tensor, connector: nn.Module) -> None:
        super().__init__(tokens, width, like)
        self._connector = (connector,)  # not a submodule: it has its own place in the model

    def embeddings(self) -> Tensor:
        (connector,) = self._connector
        return connector(self.prompt[None].to(next(connector.parameters()).dtype))


def attach(ctx: Context) -> None:
    like, tokens = ctx.model.get_input_embeddings().weight, ctx.hyper.tokens
    if ctx.hyper.place == "text":
        attach_prefix(ctx, SoftPrompt(tokens, embedding_width(ctx), like))
        return
    connector = ctx.model.get_submodule(_connector(ctx))
    attach_prefix(ctx, VisualPrompt(tokens, vision_width(ctx), like, connector))


@torch.no_grad()
def initialise(ctx: Context) -> None:
    prompt = soft_prefix(ctx).prompt
    if ctx.hyper.init == "random":
        prompt.copy_(random_uniform(prompt, 0.5, ctx.generator))
    elif ctx.hyper.place == "text":
        prompt.copy_(sampled_words(ctx, len(prompt)))
    else:
        prompt.copy_(sampled_patches(ctx, len(prompt)))


def total_parameters(ctx: Context, size: int) -> int:
    return size * (embedding_width(ctx) if ctx.hyper.place == "text" else vision_width(ctx))


def vision_width(ctx: Context) -> int:
    """Width of what the connector reads."""
    first = ctx.anatomy.linears(ctx.model, _connector(ctx), None)[0]
    return ctx.model.get_submodule(first).in_features


def sampled_patches(ctx: Context, count: int) -> Tensor:
    """Features [count, width] of patches drawn from as many training images."""
    seen: list[Tensor] = []
    connector = ctx.model.get_submodule(_connector(ctx))
    hook = connector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        for batch in ctx.batches(count):
            ctx.model.get_image_features(pixel_values=batch["pixel_values"])
    finally:
        hook.remove()
    patches = torch.cat([features.flatten(0, -2) for features in seen])
    order = torch.randperm(len(patches), generator=ctx.generator)
    return patches[order[torch.arange(count) % len(order)].to(patches.device)]


def _connector(ctx: Context) -> str:
    if ctx.anatomy.connector is None:
        raise SuiteError(
            "place: visual, but the base has no connector; use place: text, or a vision-language "
            "base"
        )
    return ctx.anatomy.connector
