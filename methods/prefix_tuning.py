"""Prefix tuning: P trained keys and values in front of every layer's own.

    attention_l(q, [K_l ; k], [V_l ; v]),   K_l and V_l [tokens, key/value heads, head width]

Keys are learned as they stand in attention, after RoPE, for a query's position counted from 0. PEFT
fills the model's cache with the prefix and counts from `tokens`: its keys are ours, all turned by
that many positions. With absolute positions (encoders) no token is moved here; PEFT moves them.

reparameterise: 0 learns K and V themselves, as LLM-Adapters and PEFT do on LLaMA (rate 3e-2). The
paper found that unstable on GPT-2 and computes them in training by an MLP, whose inner width
`reparameterise` is (512 there, 800 for summaries; rate 5e-5):

    [K_1, V_1, ..., K_L, V_L] = W2 tanh(W1 e + b1) + b2,   e [tokens, c] trains too, c = width of k

The MLP stays in the stored adapter, from which training can go on, but evaluation runs it once.

init: words starts the direct form at the keys and values that words of the vocabulary have in this
model, the paper's choice for little data (its text: real words stabilise and help); random is
PEFT's standard normal, zero PEFT's other choice (a prefix of zeros still takes attention away). The
MLP starts as torch starts linear layers.

Trainable: tokens x L x 2 x c; with the MLP of width w: tokens c + (c w + w) + 2 L c (w + 1).

Small bases: in config/all-methods.yaml (0.4 M parameters, 200 steps) no rate from 0.009 to 0.27
learns more than the form of the answers (micro-lm: 12.2 to 2.6 nats per token, 3 % exact). A prefix
can shift what frozen attention reads and computes nothing new; the paper's models are larger.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ballast.context import Context
from ballast.declare import Declaration, hyper
from ballast.errors import SuiteError
from ballast.prompts import (
    Prefix,
    SoftPrefix,
    attach_prefix,
    attention_names,
    decoder_of,
    in_front,
    keys_and_values,
    parameter,
    random_normal,
    sampled_words,
    soft_prefix,
    start_linear,
)

declaration = Declaration(
    title="Prefix tuning",
    citation="Li and Liang, Prefix-Tuning: Optimizing Continuous Prompts for Generation, ACL 2021, "
    "arXiv:2101.00190",
    family="additive",
    merges=False,
    unchanged_at_start=False,
    random_start=True,
    learning_rate=3e-2,
    learning_rate_source="LLM-Adapters on LLaMA, without the MLP; the paper's 5e-5 is with it",
    size="tokens",
)


@dataclass(frozen=True)
class Hyper:
    tokens: int = hyper(10, "LLM-Adapters, and the paper on table-to-text", low=1)
    reparameterise: int = hyper(0, "inner width of the MLP; 0 as LLM-Adapters and PEFT", low=0)
    init: str = hyper(
        "words", "activations of real words (paper, 7.4)", choices=("words", "random", "zero")
    )


class KeysAndValues(SoftPrefix):
    """Layout as in PEFT: per token key and value of the first layer, of the second, ...

    `learned` [P, L x 2 x c], or [P, c] before an MLP of width `hidden`.
    """

    def __init__(self, tokens: int, layers: int, heads: int, head: int, hidden: int, like: Tensor):
        super().__init__()
        self.shape = (tokens, layers, 2, heads, head)
        width, every = heads * head, layers * 2 * heads * head
        self.learned = parameter((tokens, width if hidden else every), like)
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        if hidden:
            for shape in ((hidden, width), (every, hidden)):
                self.weights.append(parameter(shape, like))
                self.biases.append(parameter(shape[:1], like))

    def numbers(self) -> Tensor:
        """Every key and value, [P, L x 2 x c]."""
        if not len(self.weights):
            return self.learned
        inner = torch.tanh(F.linear(self.learned, self.weights[0], self.biases[0]))
        return F.linear(inner, self.weights[1], self.biases[1])

    def prefix(self, decoder: nn.Module) -> Prefix:
        # [P, L, 2, heads, head] -> L x (key, value) [1, heads, P, head]
        layers = self.numbers().view(self.shape).permute(1, 2, 3, 0, 4)
        return Prefix([(layer[0][None], layer[1][None]) for layer in layers])


def attach(ctx: Context) -> None:
    like = ctx.model.get_input_embeddings().weight
    shape = _shape(ctx)
    attach_prefix(ctx, KeysAndValues(ctx.hyper.tokens, *shape, ctx.hyper.reparameterise, like))


@torch.no_grad()
def initialise(ctx: Context) -> None:
    module = soft_prefix(ctx)
    if len(module.weights):
        module.learned.copy_(random_normal(module.learned, 1.0, ctx.generator))
        for weight, bias in zip(module.weights, module.biases, strict=True):
            start_linear(weight, bias, ctx.generator)
    elif ctx.hyper.init == "random":
        module.learned.copy_(random_normal(module.learned, 1.0, ctx.generator))
    elif ctx.hyper.init == "words":
        module.learned.copy_(_of_words(ctx))


def total_parameters(ctx: Context, size: int) -> int:
    layers, heads, head = _shape(ctx)
    width, hidden = heads * head, ctx.hyper.reparameterise
    if not hidden:
        return size * layers * 2 * width
    return size * width + (width * hidden + hidden) + layers * 2 * width * (hidden + 1)


def _of_words(ctx: Context) -> Tensor:
    """Keys and values [P, L x 2 x c] of sampled words standing in front."""
    words = sampled_words(ctx, ctx.hyper.tokens)[None]
    absolute = ctx.anatomy.kind == "encoder"  # no position before the first
    positions = None if absolute else in_front(words.shape[1], words.device)
    was_training = ctx.model.training
    ctx.model.eval()
    pairs = keys_and_values(decoder_of(ctx), words, positions)
    ctx.model.train(was_training)
    stacked = torch.stack([torch.cat(pair) for pair in pairs])  # [L, 2, heads, P, head]
    return stacked.permute(3, 0, 1, 2, 4).flatten(1)


def _shape(ctx: Context) -> tuple[int, int, int]:
    """Layers, key/value heads and head width. Raises SuiteError where layers differ in them."""
    found = []
    for name in attention_names(ctx):
        module = ctx.model.get_submodule(name)
        head = getattr(module, "head_dim", None) or module.attention_head_size
        linears = ctx.anatomy.linears(ctx.model, name, None)
        (value,) = [linear for linear in linears if ctx.anatomy.role(linear) == "v"]
        found.append((ctx.model.get_submodule(value).out_features // head, head))
    if len(set(found)) != 1:
        raise SuiteError(
            f"layers with different heads and widths {sorted(set(found))}: "
            "prefix tuning needs the same in every layer"
        )
    return len(found), *found[0]
