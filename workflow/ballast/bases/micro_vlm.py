"""micro-vlm: a small `LlavaForConditionalGeneration` pretrained from the vision world.

A SigLIP tower is taught first, patch by patch, what each quarter of a picture shows, and is frozen;
then connector and Qwen2 language model learn to answer. The result is saved as an ordinary
transformers folder, loaded by the Auto classes exactly as a model from a hub.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from torch.nn.functional import cross_entropy
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from ballast.worlds import vision
from ballast.worlds.sprites import CELL, CELLS, COLORS, KINDS, SIDE

TOWER_STEPS, TOWER_BATCH, TOWER_RATE = 350, 128, 2e-3
STEPS, BATCH, LEARNING_RATE = 700, 64, 3e-3
WARMUP = 50
IGNORED = -100
SPECIAL = {
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
}
IMAGE, TURNS = "<image>", ("<user>", "<assistant>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} <assistant>{% else %} <user>{% endif %}"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %} {{ part['text'] }}{% else %} <image>{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %} {{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world; a question mark is a word of its own."""
    words = [*SPECIAL.values(), IMAGE, *TURNS, *vision.vocabulary()]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL["unk_token"])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Split(Regex(r"\?"), "isolated")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={
            "image_token": IMAGE,
            "user_token": TURNS[0],
            "assistant_token": TURNS[1],
        },
        clean_up_tokenization_spaces=False,
        model_max_length=64,
        **SPECIAL,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pictures of any size become 32x32, four image tokens each; needs no torchvision."""
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained network: about 1 M parameters, half of them in the tower."""
    tower = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=CELL,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=CELLS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def _pixels(pictures: np.ndarray) -> torch.Tensor:
    """What the saved processor makes of 32x32 pictures: (B, 3, 32, 32) floats in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def _optimizer(
    parameters: list[torch.nn.Parameter], rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with linear warm-up and linear decay to zero."""
    adam = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min((step + 1) / WARMUP, (steps - step) / (steps - WARMUP))
    )
    return adam, schedule


def _descend(
    name: str,
    losses: Iterator[torch.Tensor],
    parameters: list[torch.nn.Parameter],
    rate: float,
    steps: int,
    report: Callable[[str], None],
) -> None:
    """Minimise a stream of losses; `report` gets a line every tenth of the way."""
    adam, schedule = _optimizer(parameters, rate, steps)
    began = time.perf_counter()
    for step, loss in enumerate(islice(losses, steps), start=1):
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        schedule.step()
        if step % (steps // 10) == 0:
            speed = step / (time.perf_counter() - began)
            left = (steps - step) / speed
            report(
                f"{name} step {step}/{steps} loss {loss.item():.3f} "
                f"{speed:.1f} it/s ETA {left:.0f} s"
            )


def _features(model: LlavaForConditionalGeneration, pictures: np.ndarray) -> torch.Tensor:
    """The tower's patch features (B, 4, hidden), from the layer that the connector reads."""
    states = model.model.vision_tower(_pixels(pictures), output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer]


def _tower_losses(
    model: LlavaForConditionalGeneration, head: torch.nn.Module, seed: int
) -> Iterator[torch.Tensor]:
    """Endless losses of naming each quarter's kind (last class: empty) and colour, in nats."""
    for pictures, kinds, colors in vision.patches(seed, TOWER_BATCH):
        logits = head(_features(model, pictures))
        by_kind, by_color = logits.flatten(0, 1).split([len(KINDS) + 1, len(COLORS)], dim=1)
        kinds, colors = torch.from_numpy(kinds).flatten(), torch.from_numpy(colors).flatten()
        empty = kinds < 0
        kind_loss = cross_entropy(by_kind, kinds.masked_fill(empty, len(KINDS)))
        yield kind_loss + cross_entropy(by_color, colors.masked_fill(empty, IGNORED))


def _encode(batch: vision.Batch, ids: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels (B, longest), right-padded; labels cover responses only.

    Padding is not masked: it stands after all that is scored, and attention is causal.
    """
    head = [ids["<bos>"], ids["<user>"], *[ids[IMAGE]] * CELLS]
    prompts = [[*head, *(ids[w] for w in q.split()), ids["<assistant>"]] for q in batch.questions]
    answers = [[*(ids[w] for w in r.split()), ids["<eos>"]] for r in batch.responses]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    inputs = torch.full((len(prompts), width), ids["<pad>"])
    labels = torch.full((len(prompts), width), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        inputs[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return inputs, labels


def _answer_losses(
    model: LlavaForConditionalGeneration, ids: dict[str, int], seed: int
) -> Iterator[torch.Tensor]:
    """Endless mean cross-entropies over response tokens, in nats; the tower is not trained."""
    for batch in vision.pretraining(seed, BATCH):
        inputs, labels = _encode(batch, ids)
        with torch.no_grad():
            seen = _features(model, batch.images)
        embeds = model.get_input_embeddings()(inputs)
        image = model.model.multi_modal_projector(seen).flatten(0, 1)
        embeds = embeds.masked_scatter((inputs == ids[IMAGE]).unsqueeze(-1), image)
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False)[0]
        targets = labels[:, 1:]
        scored = targets != IGNORED
        yield cross_entropy(model.lm_head(hidden[:, :-1][scored]), targets[scored])


def pretrain(folder: Path, seed: int, report: Callable[[str], None]) -> None:
    """Train micro-vlm from the world's stream; save model, tokenizer, processor to `folder`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    tower = model.model.vision_tower
    head = torch.nn.Linear(tower.config.hidden_size, len(KINDS) + 1 + len(COLORS))
    taught = [*tower.parameters(), *head.parameters()]
    losses = _tower_losses(model, head, seed)
    _descend("tower", losses, taught, TOWER_RATE, TOWER_STEPS, report)
    tower.requires_grad_(False)
    taught = [p for p in model.parameters() if p.requires_grad]
    losses = _answer_losses(model, tokenizer.get_vocab(), seed)
    _descend("answers", losses, taught, LEARNING_RATE, STEPS, report)
    tower.requires_grad_(True)
    model.eval().save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
