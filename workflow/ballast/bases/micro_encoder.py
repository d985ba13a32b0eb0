"""micro-encoder: a small `RobertaForMaskedLM` pretrained from the text world in about a minute.

Masked-token modelling as BERT's and RoBERTa's, on the world's sentences: in nine rows of ten the
whole answer is masked, as upstream tasks ask for it (with fewer such rows the facts take several
times longer to be learned); in the others 20 % of all words, of which a tenth are shown as they are
and a tenth as another word. Answers are never shown swapped: facts are certain, so that the model
would learn to pay no heed to a word that it is shown, and classification has to.

It is saved as an ordinary transformers folder, so that whatever follows loads it by the Auto
classes exactly as a model from a hub.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from ballast.worlds import encoder, text

STEPS = 2400
BATCH = 32
LEARNING_RATE = 1.5e-3
WARMUP = 120
ANSWER = 0.9  # share of rows whose answer is masked as a whole
MASKED, SHOWN, SWAPPED = 0.2, 0.1, 0.1
IGNORED = -100
LENGTH = 64
SPECIAL = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": encoder.MASK,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world; pairs as RoBERTa writes them: <s> A </s> </s> B </s>."""
    words = [*SPECIAL.values(), *encoder.vocabulary()]
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, ids[token]) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        cls_token="<s>",
        sep_token="</s>",
        **SPECIAL,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> RobertaForMaskedLM:
    """The untrained network: about 0.5 M parameters, head tied to the embeddings."""
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH + 2,  # RoBERTa's positions begin after the padding's
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return RobertaForMaskedLM(config)


def _masked(row: encoder.Row, ids: dict[str, int], rng: random.Random) -> tuple[list[int], ...]:
    """Token ids of a row with gaps, and its labels: the words at the gaps."""
    sentences, gaps = encoder.filled(row)
    whole = rng.random() < ANSWER
    tokens, labels = [ids["<s>"]], [IGNORED]
    for number, (words, asked) in enumerate(zip(sentences, gaps, strict=True)):
        if number:
            tokens.append(ids["</s>"])
            labels.append(IGNORED)
        for word, gap in zip(words, asked, strict=True):
            hidden = gap if whole else rng.random() < MASKED
            labels.append(ids[word] if hidden else IGNORED)
            draw = 1.0 if whole else rng.random()
            shown = ids[encoder.MASK] if hidden else ids[word]
            if hidden and draw < SHOWN:
                shown = ids[word]
            elif hidden and draw < SHOWN + SWAPPED:
                shown = rng.randrange(len(SPECIAL), len(ids))
            tokens.append(shown)
        tokens.append(ids["</s>"])
        labels.append(IGNORED)
    return tokens, labels


def _batches(seed: int, ids: dict[str, int]) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches [BATCH, longest], right-padded: input_ids, attention_mask, labels."""
    stream = encoder.pretraining(seed)
    rng = random.Random(f"{text.WORLD_SEED} masks {seed}")
    while True:
        made = [_masked(row, ids, rng) for row in islice(stream, BATCH)]
        width = max(len(tokens) for tokens, _ in made)
        inputs = torch.full((BATCH, width), ids["<pad>"])
        labels = torch.full((BATCH, width), IGNORED)
        for i, (tokens, wanted) in enumerate(made):
            inputs[i, : len(tokens)] = torch.tensor(tokens)
            labels[i, : len(tokens)] = torch.tensor(wanted)
        mask = (inputs != ids["<pad>"]).long()
        yield {"input_ids": inputs, "attention_mask": mask, "labels": labels}


def _loss(model: RobertaForMaskedLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy in nats over masked tokens; the head runs on those positions only."""
    labels = batch["labels"]
    hidden = model.roberta(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    scored = labels != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[scored]), labels[scored])


def _learning_rate(step: int) -> float:
    """Factor on the learning rate: linear warm-up, then linear decay to zero."""
    return min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))


def pretrain(folder: Path, seed: int, report: Callable[[str], None]) -> None:
    """Train micro-encoder from the world's stream and save model and tokenizer to `folder`."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate)
    began = time.perf_counter()
    batches = islice(_batches(seed, tokenizer.get_vocab()), STEPS)
    for step, batch in enumerate(batches, start=1):
        loss = _loss(model, batch)
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
