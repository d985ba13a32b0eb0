"""Golden numbers: training and evaluation give what they gave, or their version is raised.

Cells are trained again when `versions.TRAIN` changes and scored again when `versions.EVALUATION`
does, and only then; a change of numbers under an unchanged version would mix old results with new.
The bases here are filled by an integer formula, not by a random generator, so that the numbers do
not hang on the version of torch.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ballast import versions
from ballast.anatomy import anatomy_of
from ballast.data import prepare_task
from ballast.evaluation import score_task
from ballast.harness import language_model
from ballast.models import Base
from ballast.tasks import Task
from ballast.training import Examples, Trainer
from tiny import tuner_of

WORDS = 48

GOLDEN = {
    "TRAIN": {
        "version": 1,
        "numbers": {
            "lora, step 1": 4.0502594,
            "lora, step 2": 3.8503464,
            "lora, step 3": 4.5244489,
            "lora, step 4": 3.6853874,
            "lora, step 5": 4.0703111,
            "full_st, step 1": 4.0665746,
            "full_st, step 2": 3.9151657,
            "full_st, step 3": 4.2225091,
            "full_st, step 4": 3.3564711,
            "full_st, step 5": 3.762797,
        },
    },
    "EVALUATION": {
        "version": 2,
        "numbers": {
            "multiple_choice, value": 41.6666667,
            "multiple_choice, n": 12,
            "multiple_choice, loss": 3.8036655,
            "generate_until, value": 6.1538462,
            "generate_until, n": 5,
            "generate_until, loss": 4.0144293,
            "generate_until, answered": 100.0,
            "loglikelihood_rolling, value": 2.9850746,
            "loglikelihood_rolling, n": 4,
            "loglikelihood_rolling, loss": 4.231718,
            "loglikelihood_rolling, byte_perplexity": 3.0943631,
        },
    },
}


def check(kind: str, found: dict[str, float]) -> None:
    """Compare numbers with the golden ones of `versions.<kind>`; fails with what to do."""
    golden, version = GOLDEN[kind], getattr(versions, kind)
    numbers = json.dumps(found, indent=4)
    same = golden["numbers"].keys() == found.keys() and all(
        math.isclose(found[name], value, rel_tol=1e-4) for name, value in golden["numbers"].items()
    )
    if golden["version"] != version:
        pytest.fail(
            f"versions.{kind} is {version}, the golden numbers are of version {golden['version']}: "
            f"write that version and these numbers into GOLDEN[{kind!r}] of {__file__}:\n{numbers}"
        )
    if not same:
        pytest.fail(
            f"the numbers changed, but versions.{kind} is still {version}. If that is meant, raise "
            f"{kind} to {version + 1} in workflow/ballast/versions.py, so that cells rerun, "
            f"and write that version and these numbers into GOLDEN[{kind!r}] of {__file__}; "
            f"golden: {json.dumps(golden['numbers'])}; found:\n{numbers}"
        )


@torch.no_grad()
def fill(model: torch.nn.Module, spread: float = 0.6) -> None:
    """Weights by a linear congruence over their places; norms around one."""
    for number, parameter in enumerate(model.parameters()):
        places = np.arange(parameter.numel(), dtype=np.int64)
        values = ((places * 7919 + number * 104_729 + places // 13 * 31) % 1009) / 1009 - 0.5
        values = torch.from_numpy(values * spread).view(parameter.shape)
        parameter.copy_(1 + values if parameter.ndim == 1 else values)


def base() -> Base:
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(WORDS - 4))]
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    fill(model)
    return Base(model, tokenizer, None, anatomy_of(model))


def train_losses(method: str) -> list[float]:
    ids = [
        np.array([4 + (row * 17 + place * 29 + row * place) % (WORDS - 4) for place in range(size)])
        for row, size in enumerate([7, 9, 12, 8, 15, 10, 11, 13, 9, 14])
    ]
    settings = {
        "steps": 5,
        "batch_size": 2,
        "accumulation": 2,
        "schedule": "cosine",
        "warmup": 0.4,
        "weight_decay": 0.05,
        "clip": 1.0,
        "precision": "fp32",
        "gradient_checkpointing": False,
        "checkpoint_every": 100,
    }
    tuner = tuner_of(method, base().model, [], steps=5)
    trainer = Trainer(tuner, Examples(ids, [4] * len(ids), 0), settings, seed=11)
    trainer.prepare()
    for _, adapter in tuner.ctx.adapters():
        fill(adapter_own(adapter), 0.2)
    return trainer.run().losses


def adapter_own(adapter: torch.nn.Module) -> torch.nn.Module:
    """The adapter's own parameters, without its base's."""
    own = torch.nn.Module()
    for name, parameter in adapter.named_parameters():
        if not name.startswith("base."):
            own.register_parameter(name, parameter)
    return own


def test_training():
    found = {
        f"{method}, step {step}": loss
        for method in ("lora", "full_st")
        for step, loss in enumerate(train_losses(method), 1)
    }
    check("TRAIN", found)


def text(row: int, size: int) -> str:
    return " ".join(
        f"w{(row * 23 + place * 31 + row * place * 7) % (WORDS - 4)}" for place in range(size)
    )


def made_task(kind: str, rows: list[dict], tmp_path) -> Task:
    metric = {
        "multiple_choice": "accuracy",
        "generate_until": "rouge_l",
        "loglikelihood_rolling": "next_token_accuracy",
    }[kind]
    path = tmp_path / f"{kind}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    config = {"task": kind, "output_type": kind, "doc_to_text": "prompt"}
    if kind == "multiple_choice":
        config |= {"doc_to_choice": "choices", "doc_to_target": "answer"}
    elif kind == "generate_until":
        config["doc_to_target"] = "response"
        config["generation_kwargs"] = {"until": [], "do_sample": False, "max_gen_toks": 16}
    else:
        config |= {"doc_to_text": "", "doc_to_target": "text"}
    source = {"reader": "jsonl", "test": str(path)}
    metadata = {"metric": metric, "unit": "points", "direction": "higher", "source": source}
    return Task(kind, path, config | {"metadata": metadata}, "")


def test_evaluation(tmp_path):
    scored = base()
    lm = language_model(scored, 4)
    choices = [
        {
            "question": text(row, 5),
            "choices": [text(row + 50 + i, 1 + i % 2) for i in range(4)],
            "answer": (row + 1) % 4,
        }
        for row in range(12)
    ]
    asked = [{"question": text(row, 4), "response": text(row + 90, 10)} for row in range(5)]
    running = [{"text": text(row, 20 + 9 * row)} for row in range(4)]  # the last exceed the context
    found = {}
    for kind, rows in (
        ("multiple_choice", choices),
        ("generate_until", asked),
        ("loglikelihood_rolling", running),
    ):
        task = made_task(kind, rows, tmp_path)
        entry = {"sizes": {"test": None}, "max_length": None}
        spec = {"template": "<bos> {question}", "delimiter": " "}
        folder = tmp_path / "data" / kind
        prepare_task(lambda: scored, spec, task, entry, folder, lambda line: None)
        summary = score_task(lm, task, folder, " ").summary
        found |= {f"{kind}, {name}": number for name, number in summary.items()}
    check("EVALUATION", found)


def test_a_changed_number_fails_and_says_what_to_do(monkeypatch):
    golden = GOLDEN["TRAIN"]["numbers"]
    check("TRAIN", dict(golden))
    name = next(iter(golden))
    check("TRAIN", golden | {name: golden[name] * (1 + 1e-5)})
    with pytest.raises(pytest.fail.Exception, match=r"raise TRAIN to 2 in .*versions.py"):
        check("TRAIN", golden | {name: golden[name] * (1 + 2e-4)})
    monkeypatch.setattr(versions, "TRAIN", versions.TRAIN + 1)
    with pytest.raises(pytest.fail.Exception, match="golden numbers are of version 1"):
        check("TRAIN", dict(golden))
