"""P-tuning: a soft prompt that a small network computes, so that its tokens depend on one another.

    inputs = [h(E) ; embeddings of the example],   E [tokens, d] trains, h too
    mlp:   h = W3 relu(W2 relu(W1 e + b1) + b2) + b3                       widths d, w, w, d
    lstm:  h = W2 relu(W1 biLSTM(E) + b1) + b2, two layers of w each way   widths d, 2w, 2w, d

The paper's h is the biLSTM with an MLP head, w = d/2 in its code; the default here is PEFT's, the
MLP, with w = d. The paper puts its tokens between the words of a cloze template; here, as in PEFT,
all stand in front (`ballast.prompts`). Outputs and gradients are those of PEFT's P_TUNING. E starts
normal, linear layers and LSTM as torch starts them. At evaluation h is computed once; it stays in
the stored adapter, from which training can go on.

Trainable, mlp: tokens d + (d w + w) + (w^2 + w) + (w d + d).

Small bases: in config/all-methods.yaml no rate from 0.0009 to 0.009 learns more than the form of
the answers (micro-lm: 12.2 to 2.9 nats per token, 1 % exact); see `prompt_tuning` for the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.prompts import (
    SoftPrompt,
    attach_prefix,
    embedding_width,
    parameter,
    random_normal,
    random_uniform,
    soft_prefix,
    start_linear,
)

declaration = Declaration(
    title="P-tuning",
    citation="Liu et al., GPT Understands, Too, 2021, arXiv:2103.10385",
    family="additive",
    merges=False,
    unchanged_at_start=False,
    random_start=True,
    learning_rate=1e-5,
    learning_rate_source="the released code for LAMA (Adam)",
    applies_to=("text", "vision-language"),
    size="tokens",
)


@dataclass(frozen=True)
class Hyper:
    tokens: int = hyper(9, "template (3, 3, 3) of the released code", low=1)
    encoder: str = hyper("mlp", "PEFT's default; the paper's is lstm", choices=("mlp", "lstm"))
    width: int = hyper(0, "w; 0 for d (mlp) or d/2 (lstm, as in the released code)", low=0)


class EncodedPrompt(SoftPrompt):
    """h(E): `prompt` is E; head: weights and biases of the linear layers."""

    def __init__(self, tokens: int, width: int, hidden: int, encoder: str, like: Tensor) -> None:
        super().__init__(tokens, width, like)
        self.lstm = None
        widths = [width, hidden, hidden, width]
        if encoder == "lstm":
            kind = {"dtype": self.prompt.dtype, "device": "meta"}  # draws no random numbers
            lstm = nn.LSTM(
                width, hidden, num_layers=2, bidirectional=True, batch_first=True, **kind
            )
            self.lstm = lstm.to_empty(device=like.device)
            widths = [2 * hidden, 2 * hidden, width]
        shapes = list(zip(widths[1:], widths[:-1], strict=True))
        self.weights = nn.ParameterList([parameter(shape, like) for shape in shapes])
        self.biases = nn.ParameterList([parameter(shape[:1], like) for shape in shapes])

    def embeddings(self) -> Tensor:
        x = self.prompt[None]
        if self.lstm is not None:
            x = self.lstm(x)[0]
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = F.linear(F.relu(x) if i else x, weight, bias)
        return x


def attach(ctx: Context) -> None:
    width, hyper = embedding_width(ctx), ctx.hyper
    hidden = _hidden(ctx)
    like = ctx.model.get_input_embeddings().weight
    attach_prefix(ctx, EncodedPrompt(hyper.tokens, width, hidden, hyper.encoder, like))


@torch.no_grad()
def initialise(ctx: Context) -> None:
    module = soft_prefix(ctx)
    module.prompt.copy_(random_normal(module.prompt, 1.0, ctx.generator))
    if module.lstm is not None:
        for _, tensor in sorted(module.lstm.named_parameters()):
            tensor.copy_(random_uniform(tensor, module.lstm.hidden_size**-0.5, ctx.generator))
    for weight, bias in zip(module.weights, module.biases, strict=True):
        start_linear(weight, bias, ctx.generator)


def total_parameters(ctx: Context, size: int) -> int:
    d, w = embedding_width(ctx), _hidden(ctx)
    if ctx.hyper.encoder == "mlp":
        return size * d + (d * w + w) + (w * w + w) + (w * d + d)
    # Two layers of two directions, four gates each: inputs, recurrence and two biases.
    lstm = 2 * 4 * w * (d + w + 2) + 2 * 4 * w * (2 * w + w + 2)
    return size * d + lstm + (2 * w * 2 * w + 2 * w) + (2 * w * d + d)


def _hidden(ctx: Context) -> int:
    width = embedding_width(ctx)
    return ctx.hyper.width or (width if ctx.hyper.encoder == "mlp" else width // 2)
