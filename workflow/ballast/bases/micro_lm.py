"""micro-lm: a small `LlamaForCausalLM` pretrained from the text world in about a minute.

It is saved as an ordinary transformers folder, so that whatever follows loads it by the Auto
classes exactly as a model from a hub.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ballast.worlds import text

STEPS = 1000
BATCH = 64
LEARNING_RATE = 3e-3
WARMUP = 60
ROPE_THETA = 100.0
IGNORED = -100
SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
}
TURNS = ("<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} <assistant> {{ message['content'] }} {{ eos_token }}"
    "{% else %} <user> {{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world, with the chat template of one user and one assistant."""
    words = [*SPECIAL.values(), *TURNS, *text.vocabulary()]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL["unk_token"])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=list(TURNS),
        clean_up_tokenization_spaces=False,
        model_max_length=64,
        **SPECIAL,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained network: about 0.4 M parameters, head tied to the embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _encode(row: text.Row, ids: dict[str, int]) -> tuple[list[int], int]:
    """Token ids of the rendered conversation, and where its response starts."""
    question = [ids[w] for w in str(row["question"]).split()]
    response = [ids[w] for w in str(row["response"]).split()]
    prompt = [ids["<bos>"], ids["<user>"], *question, ids["<assistant>"]]
    return [*prompt, *response, ids["<eos>"]], len(prompt)


def _batches(seed: int, ids: dict[str, int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (inputs, labels), each [BATCH, longest], right-padded; labels cover responses only.

    Padding is not masked: it stands after all that is scored, and attention is causal.
    """
    stream = text.pretraining(seed)
    while True:
        encoded = [_encode(row, ids) for row in islice(stream, BATCH)]
        width = max(len(tokens) for tokens, _ in encoded)
        inputs = torch.full((BATCH, width), ids["<pad>"])
        labels = torch.full((BATCH, width), IGNORED)
        for i, (tokens, start) in enumerate(encoded):
            inputs[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, start : len(tokens)] = torch.tensor(tokens[start:])
        yield inputs, labels


def _loss(model: LlamaForCausalLM, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over response tokens; the head runs on those positions only."""
    hidden = model.model(inputs, use_cache=False).last_hidden_state
    targets = labels[:, 1:]
    scored = targets != IGNORED
    logits = model.lm_head(hidden[:, :-1][scored])
    return torch.nn.functional.cross_entropy(logits, targets[scored])


def _learning_rate(step: int) -> float:
    """Factor on the learning rate: linear warm-up, then linear decay to zero."""
    return min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))


def pretrain(folder: Path, seed: int, report: Callable[[str], None]) -> None:
    """Train micro-lm from the world's stream and save model and tokenizer to `folder`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate)
    began = time.perf_counter()
    batches = islice(_batches(seed, tokenizer.get_vocab()), STEPS)
    for step, (inputs, labels) in enumerate(batches, start=1):
        loss = _loss(model, inputs, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % (STEPS // 10) == 0:
            rate = step / (time.perf_counter() - began)
            progress = f"step {step}/{STEPS} loss {loss.item():.3f}"
            report(f"{progress} {rate:.1f} it/s ETA {(STEPS - step) / rate:.0f} s")
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
