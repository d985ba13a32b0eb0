"""Encoders: masked tokens kept, classes learned by a head that no method sees.

World and base, task forms and their data, loading, the head beside every method, and scores.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from ballast import metrics
from ballast.anatomy import anatomy_of, targets_of
from ballast.bases import micro_encoder
from ballast.bases.build import make_base
from ballast.cell import Work
from ballast.data import load_split, prepare_task
from ballast.declare import discover
from ballast.encoders import HEAD, EncoderLM, HeadTuner, add_head
from ballast.errors import DataError, SuiteError
from ballast.evaluation import score_task
from ballast.harness import language_model
from ballast.layout import Layout
from ballast.models import is_encoder, load_base
from ballast.plan import make_plan
from ballast.suite import load_suite, read_config
from ballast.tasks import Task, read_task, read_tasks
from ballast.template import Encoding
from ballast.training import Examples, Trainer, response_loss
from ballast.worlds import encoder as world
from ballast.worlds import text
from tiny import METHODS, backward, distance, logits, randomise, same_bytes, tuner_of
from tiny_models import CLASSES

ROOT = Path(__file__).resolve().parents[1]
FILES = discover(METHODS)
ON_ENCODERS = [
    name
    for name, file in FILES.items()
    if file.declaration.trains and "encoder" in file.declaration.applies_to
]
HEAD_RATE = 1e-2
DOUBLE = torch.float64
SPEC = {"template": "chat"}


def task_of(kind: str, rows: dict | Path, **metadata) -> Task:
    config = {"task": kind, "output_type": kind}
    metadata = {"unit": "points", "direction": "higher", "source": rows, "title": kind} | metadata
    return Task(kind, Path(kind), config | {"metadata": metadata}, "")


def rows_file(folder: Path, rows: list[dict], name: str = "rows") -> dict:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return {"reader": "jsonl", "train": str(path), "test": str(path)}


def prepare(base, task, folder, sizes, spec=SPEC, max_length=None):
    entry = {"sizes": sizes, "max_length": max_length}
    return prepare_task(lambda: base, spec, task, entry, folder, lambda line: None)


@pytest.fixture(scope="module")
def micro(tmp_path_factory):
    """micro-encoder untrained, as a folder; dropout is off and its weights are far from zero."""
    folder = tmp_path_factory.mktemp("micro_encoder")
    tokenizer = micro_encoder.build_tokenizer()
    torch.manual_seed(0)
    model = micro_encoder.build_model(tokenizer).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base(micro):
    return load_base(micro)


# --- world and base -------------------------------------------------------------------------------


def test_splits_are_disjoint_and_classes_balanced():
    for task in (*world.UPSTREAM, *world.DOWNSTREAM):
        made = {split: world.rows(task, split, 150) for split in text.SPLITS}
        keys = {s: {world._identity(row) for row in rows} for s, rows in made.items()}
        assert not keys["train"] & keys["test"]
        assert not keys["train"] & keys["validation"]
        assert not keys["validation"] & keys["test"]
        if task in world.DOWNSTREAM:
            share = np.mean([row["answer"] for row in made["train"]])
            assert 0.3 < share < 0.6
            assert all(row["choices"][row["answer"]] == row["response"] for row in made["train"])


def test_classes_are_what_they_say():
    """An oracle that reads the sentences: what a row claims, from its words alone."""

    def claim(sentence):
        words = sentence.split()
        name = next(w for w in words if w in text.NAMES)
        kind = next(w for w in words if w in text.VALUES)
        return name, kind, next(w for w in words if w in text.VALUES[kind])

    for row in world.rows("entails", "train", 200):
        assert (claim(row["question"]) == claim(row["pair"])) == bool(row["answer"])
    for row in world.rows("true", "train", 200):
        name, kind, value = claim(row["question"])
        assert (text.FACTS[name, kind] == value) == bool(row["answer"])
    for row in world.rows("acceptable", "train", 200):
        words = row["question"].split()
        right = {"today": ("is", "are"), "yesterday": ("was", "were")}[words[0]]
        assert (words[-1] == right[words[2].endswith("s")]) == bool(row["answer"])
    for row in world.rows("read", "train", 200):
        name, kind, value = claim(row["question"])
        asked = next(w for w in row["pair"].split() if w in text.NAMES)
        assert row["response"] == (value if asked == name else text.FACTS[asked, kind])


def test_no_side_of_a_pair_gives_the_class_away():
    """The best guess from one sentence of `entails`, or from its words, is about chance."""
    rows = world.rows("entails", "train", 3000)
    for side in ("question", "pair"):
        votes = Counter()
        for row in rows[:2000]:
            for word in row[side].split():
                votes[word] += 1 if row["answer"] else -1
        right = [
            (sum(votes[w] for w in row[side].split()) > 0) == bool(row["answer"])
            for row in rows[2000:]
        ]
        assert np.mean(right) < 0.58


def test_facts_of_the_truth_test_are_in_no_training_row():
    def facts(split):
        found = set()
        for row in world.rows("true", split, 300):
            words = row["question"].split()
            found.add(tuple(w for w in words if w in text.NAMES or w in text.VALUES))
        return {tuple(sorted(pair)) for pair in found}

    assert not facts("train") & facts("test")


def test_every_downstream_word_is_seen_in_pretraining():
    counts = world.token_counts(0, 20_000)
    for task in world.DOWNSTREAM:
        for row in world.rows(task, "test", 200):
            for word in f"{row['question']} {row.get('pair', '')}".split():
                assert counts[word] >= 20, word
    assert set(counts) <= set(world.vocabulary())


def test_pretraining_masks_answers_or_a_share_of_words():
    tokenizer = micro_encoder.build_tokenizer()
    ids, stream = tokenizer.get_vocab(), world.pretraining(0)
    rng = random.Random(0)
    whole = 0
    for _ in range(400):
        row = next(stream)
        tokens, labels = micro_encoder._masked(row, ids, rng)
        sentences, gaps = world.filled(row)
        plain = tokenizer(*[" ".join(words) for words in sentences])["input_ids"]
        assert len(tokens) == len(labels) == len(plain)
        for token, label, true in zip(tokens, labels, plain, strict=True):
            assert label in (-100, true)
            assert token == true or label == true
        answer = [tokenizer(w, add_special_tokens=False)["input_ids"][0]
                  for words, asked in zip(sentences, gaps, strict=True)
                  for w, gap in zip(words, asked, strict=True) if gap]  # fmt: skip
        whole += [label for label in labels if label != -100] == answer
    assert 0.85 < whole / 400 < 0.97


def test_pretraining_learns_and_is_the_same_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(micro_encoder, "STEPS", 20)
    monkeypatch.setattr(micro_encoder, "WARMUP", 5)
    lines: list[str] = []
    for name in ("one", "two"):
        make_base({"source": {"world": "micro-encoder", "seed": 3}}, tmp_path / name, lines.append)
    one, two = (load_base(tmp_path / name / "model") for name in ("one", "two"))
    assert same_bytes(one.model.state_dict(), two.model.state_dict())
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines[:10]]
    assert sum(losses[-2:]) < sum(losses[:2])
    assert isinstance(one.model, RobertaForMaskedLM)
    assert 400_000 < sum(p.numel() for p in one.model.parameters()) < 600_000


# --- loading and anatomy --------------------------------------------------------------------------

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
OTHERS = {
    "bert": (BertForMaskedLM, BertConfig(**SMALL, intermediate_size=24), "bert.encoder.layer"),
    "deberta": (
        DebertaV2ForMaskedLM,
        DebertaV2Config(
            **SMALL,
            intermediate_size=24,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            share_att_key=True,  # as in DeBERTa-v3
        ),
        "deberta.encoder.layer",
    ),
    "distilbert": (
        DistilBertForMaskedLM,
        DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=2, hidden_dim=24),
        "distilbert.transformer.layer",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_anatomy_of_other_encoders(kind):
    build, config, layers = OTHERS[kind]
    model = build(config).eval()
    anatomy = anatomy_of(model)
    assert (anatomy.kind, anatomy.layers) == ("encoder", layers)
    assert model.get_submodule(anatomy.embeddings) is model.get_input_embeddings()
    assert len(anatomy.layer_names(model)) == 2
    assert len(targets_of(model, "all", "frozen")) == 12  # six linears in each of two layers
    add_head(model, {"t": 2}, seed=0)
    assert anatomy_of(model) == anatomy
    ids = torch.randint(5, 40, (3, 6))
    labels = torch.full((3, 6), -100)
    labels[:, 1] = torch.tensor([0, 1, 1])
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    assert out.logits.shape == (3, 2)
    assert model(input_ids=ids).logits.shape == (3, 6, 40)


def test_roles_of_an_encoders_linears(make_model):
    model = make_model("roberta")
    anatomy = anatomy_of(model)
    roles = [anatomy.role(name) for name in targets_of(model, "all", "frozen")[:6]]
    assert roles == ["q", "k", "v", "o", "up", "down"]
    assert anatomy.role(f"{HEAD}.dense") is None
    assert anatomy.role("lm_head.dense") is None


def test_which_configurations_are_encoders():
    config = BertConfig()
    for names, decoder, expected in (
        (["BertForMaskedLM"], False, True),
        (["BertForMaskedLM"], True, False),
        (["BertLMHeadModel"], False, False),
        (None, False, False),  # BERT may be either: transformers knows it as both
    ):
        config.architectures, config.is_decoder = names, decoder
        assert is_encoder(config) == expected
    assert is_encoder(DebertaV2Config())
    assert not is_encoder(LlamaConfig())


def _word_pieces(folder: Path) -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer whose longer words are several tokens."""
    line = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat sat on a mat was here ##s ##ting sit"
    words = line.split()
    ids = {w: i for i, w in enumerate(words)}
    inner = Tokenizer(WordPiece(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=16,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture
def bert(tmp_path):
    """A tiny BERT with segments and word pieces, as a folder from elsewhere."""
    folder = tmp_path / "bert"
    torch.manual_seed(1)
    config = BertConfig(**SMALL, intermediate_size=24, max_position_embeddings=16)
    BertForMaskedLM(config).save_pretrained(folder)
    _word_pieces(folder)
    return folder


def test_an_encoder_from_a_folder_fills_gaps_and_classifies(bert, tmp_path):
    made = make_base({"source": {"path": str(bert)}}, tmp_path / "made", lambda line: None)
    base = load_base(Path(made["model"]))
    assert base.anatomy.kind == "encoder"
    assert isinstance(language_model(base, 2), EncoderLM)
    assert type(base.model).__name__ == "BertForMaskedLM"

    rows = [{"text": "the cat sat on a mat"}, {"text": "a cat was here"}]
    task = task_of("masked_token", rows_file(tmp_path, rows), metric="masked_token_accuracy")
    prepare(base, task, tmp_path / "m", {"test": None})
    scores = score_task(language_model(base, 2), task, tmp_path / "m", "")
    assert scores.summary["n"] == 2
    assert list(scores.items["tokens"]) == [1, 1]  # 15 % of 6 and of 4, rounded, at least one

    pairs = [
        {"question": f"the cat sat on {w}", "pair": f"{w} was here", "answer": i % 2}
        for i, w in enumerate(["a", "the", "mat", "cat", "sits", "here", "was", "on", "sitting"])
    ]
    source = rows_file(tmp_path, pairs, "pairs")
    source |= {"test": rows_file(tmp_path, [{**pairs[0], "pair": "the mat"}], "held")["test"]}
    task = task_of("classification", source, metric="f1", classes=["no", "yes"])
    prepare(base, task, tmp_path / "c", {"test": None, "train": None})
    table, _ = load_split(tmp_path / "c", "train")
    row = table[0]
    assert set(row["token_type_ids"]) == {0, 1}
    add_head(base.model, {"classification": 2}, seed=0)
    examples = Examples(
        table["input_ids"][:], table["prompt_length"][:], 0,
        classes=table["label"][:], token_types=table["token_type_ids"][:],
    )  # fmt: skip
    batch = examples.batch(np.arange(3), torch.device("cpu"))
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    base.model.eval()
    loss = response_loss(base.model, batch)
    batch["token_type_ids"].zero_()
    assert response_loss(base.model, batch) != loss, "segments do not reach the model"
    summary = score_task(language_model(base, 2), task, tmp_path / "c", "").summary
    assert summary["n"] == 1


def test_an_encoder_without_its_masked_head_is_refused(tmp_path):
    config = micro_encoder.build_model(micro_encoder.build_tokenizer()).config
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    micro_encoder.build_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    about = json.loads(path.read_text()) | {"architectures": ["RobertaForMaskedLM"]}
    path.write_text(json.dumps(about))
    with pytest.raises(DataError, match="no weights for lm_head"):
        load_base(tmp_path)


# --- rows, tokens, data ---------------------------------------------------------------------------


def test_words_of_several_tokens_are_masked_token_by_token(tmp_path):
    encoding = Encoding(_word_pieces(tmp_path))
    row = {
        "question": "the <mask> was here",
        "pair": "a <mask> <mask>",
        "response": "cats sat mats",
    }
    found = encoding.masked(row)
    words = encoding.tokenizer.convert_ids_to_tokens
    shown = "[CLS] the [MASK] [MASK] was here [SEP] a [MASK] [MASK] [MASK] [SEP]"
    assert " ".join(words(found["input_ids"])) == shown
    assert words(found["answers"]) == ["cat", "##s", "sat", "mat", "##s"]
    assert found["positions"] == [2, 3, 8, 9, 10]
    assert found["token_type_ids"] == [0] * 7 + [1] * 5


def test_plain_text_is_masked_the_same_every_time(tmp_path):
    encoding = Encoding(_word_pieces(tmp_path))
    line = " ".join(["the cat sat on a mat was here"] * 5)
    one, two = (encoding.masked({"text": line}) for _ in range(2))
    assert one == two
    assert len(one["positions"]) == 6
    assert encoding.masked({"text": line + " a"})["positions"] != one["positions"]
    assert min(one["positions"]) > 0
    assert max(one["positions"]) < len(one["input_ids"]) - 1


def test_a_template_of_the_base_is_applied():
    tokenizer = micro_encoder.build_tokenizer()
    asked = Encoding(tokenizer, "tell {question}")
    ids = asked.masked({"question": "the <mask>", "response": "cat"})["input_ids"]
    assert tokenizer.decode(ids) == "<s> tell the <mask> </s>"
    assert asked.digest() != Encoding(tokenizer).digest()
    assert Encoding(tokenizer, "chat").example({"question": "the"}) == Encoding(tokenizer).example(
        {"question": "the"}
    )


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("masked_token", {"question": "the <mask>", "response": "a b"}, "1 times <mask> for 2"),
        ("masked_token", {"question": "the cat", "response": "cat"}, "0 times <mask> for 1"),
        ("classification", {"question": "the", "response": "maybe"}, "one of the classes no, yes"),
        ("classification", {"question": "the", "answer": 2}, "one of the classes no, yes"),
        ("classification", {"question": "the", "answer": True}, "one of the classes no, yes"),
    ],
)
def test_rows_that_do_not_fit_the_task_are_refused(kind, row, message, base, tmp_path):
    classes = {"classes": ["no", "yes"]} if kind == "classification" else {}
    task = task_of(kind, rows_file(tmp_path, [row]), metric="accuracy", **classes)
    with pytest.raises(DataError, match=message):
        prepare(base, task, tmp_path / "data", {"test": None})


def test_rows_that_are_too_long_are_dropped_and_counted(base, tmp_path):
    rows = [{"question": "the cat " * n, "answer": 0} for n in (1, 3, 40)]
    source = rows_file(tmp_path, rows)
    task = task_of("classification", source, metric="accuracy", classes=["a", "b"])
    for longest, lost in ((None, 1), (6, 2)):
        made = prepare(base, task, tmp_path / f"{longest}", {"test": None}, max_length=longest)
        assert made["splits"]["test"]["too_long"] == lost
    with pytest.raises(DataError, match="no row has at most 3 tokens"):
        prepare(base, task, tmp_path / "none", {"test": None}, max_length=3)


def test_pairs_are_told_apart_by_both_sentences(base, tmp_path):
    rows = [{"question": "the cat", "pair": pair, "answer": 0} for pair in ("a", "b")]
    task = task_of(
        "classification",
        rows_file(tmp_path, rows[:1]) | {"test": rows_file(tmp_path, rows[1:], "t")["test"]},
        metric="accuracy",
        classes=["a", "b"],
    )
    made = prepare(base, task, tmp_path / "data", {"test": None, "train": None})
    assert made["splits"]["train"]["rows"] == made["splits"]["test"]["rows"] == 1


def test_tasks_and_bases_of_different_kinds_are_refused(base, make_model, tmp_path):
    task = read_tasks(ROOT / "workflow" / "tasks")["lm_facts"]
    with pytest.raises(DataError, match="the base is an encoder"):
        prepare(base, task, tmp_path / "a", {"test": 5})
    base.anatomy = anatomy_of(make_model("llama"))
    task = read_tasks(ROOT / "workflow" / "tasks")["enc_facts"]
    with pytest.raises(DataError, match="the base is no encoder"):
        prepare(base, task, tmp_path / "b", {"test": 5})


# --- the head beside a method ---------------------------------------------------------------------


def head_tuner(name, model, batches, seed=0, **options) -> HeadTuner:
    plain = tuner_of(name, model, batches, seed=seed, **options)
    return HeadTuner(plain.method, plain.ctx, HEAD_RATE)


def optimiser_of(tuner):
    return torch.optim.AdamW(tuner.parameter_groups(0.1))


def train(tuner, batches, steps, optimiser):
    """The training loop's order of work; `tiny.train` clips by the method's parameters alone."""
    ctx = tuner.ctx
    ctx.model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        backward(tuner, [batches[ctx.step % len(batches)]][0])
        tuner.after_backward()
        groups = [p for group in optimiser.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(groups, 1.0)
        optimiser.step()
        ctx.step += 1
        tuner.after_step()
    ctx.model.eval()


@pytest.mark.parametrize("name", ON_ENCODERS)
def test_every_method_on_an_encoder(name, make_model, make_batches):
    """In one pass: start, gradients, head trained and counted apart, resume, reload, merge."""
    batches = make_batches("roberta", 2, DOUBLE)
    untouched = make_model("roberta", DOUBLE)
    tuner = head_tuner(name, make_model("roberta", DOUBLE), batches)
    tuner.start()
    model, declaration = tuner.ctx.model, FILES[name].declaration
    moved = distance(logits(model, batches[0]), logits(untouched, batches[0]))
    assert moved < 1e-12 if declaration.unchanged_at_start else moved > 1e-7
    randomise(tuner)

    own, head = (
        set(tuner.ctx.trainable()),
        {f"{HEAD}.{n}" for n, _ in tuner.head.named_parameters()},
    )
    assert not own & head
    groups = tuner.parameter_groups(0.0)
    assert sorted(n for group in groups for n in group["names"]) == sorted(own | head)
    assert groups[-1]["lr"] == HEAD_RATE
    assert tuner.head_count() == 32 * 32 + 32 + 32 * CLASSES + CLASSES
    backward(tuner, batches[0])
    for parameter_name, parameter in model.named_parameters():
        if parameter_name in head:
            assert parameter.grad.any(), parameter_name
        elif parameter_name not in own:
            assert parameter.grad is None, parameter_name
    model.zero_grad(set_to_none=True)

    optimiser = optimiser_of(tuner)
    train(tuner, batches, 2, optimiser)
    stored = {k: v.clone() for k, v in tuner.tensors().items()}
    assert {k.removeprefix("weight.") for k in stored} >= head
    resumed = head_tuner(name, make_model("roberta", DOUBLE), [])
    resumed.restore(stored)
    resumed.ctx.step = 2
    assert same_bytes(resumed.tensors(), stored)
    again = optimiser_of(resumed)
    again.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for each, its in ((tuner, optimiser), (resumed, again)):
        train(each, batches, 2, its)
    assert same_bytes(resumed.tensors(), tuner.tensors())

    after = model.state_dict()
    plain = untouched.state_dict()
    declared = ("embeddings", "lm_head") if getattr(tuner.ctx.hyper, "embeddings", False) else ()
    for key, value in plain.items():
        if key in head:
            assert not torch.equal(after[key], value), key
        elif f"{tuner.ctx.anatomy.layers}." not in key and not any(p in key for p in declared):
            assert torch.equal(after[key], value), key
    before = logits(model, batches[0])
    assert torch.isfinite(before).all()
    if declaration.merges:
        tuner.merge()
        assert set(model.state_dict()) == set(plain)
        assert distance(logits(model, batches[0]), before) < 1e-10


def test_the_head_comes_from_the_seed(make_model):
    heads = []
    for seed in (0, 0, 1):
        model = make_model("roberta")
        add_head(model, {"a": 2, "b": 3}, seed)
        heads.append(dict(model.class_head.state_dict()))
    assert same_bytes(heads[0], heads[1])
    assert not same_bytes(heads[0], heads[2])
    assert set(heads[0]) == {"dense.weight", "dense.bias", "out.weight", "out.bias"}


def test_a_head_of_a_bf16_base_is_kept_in_fp32(make_model, make_batches):
    model = make_model("roberta", torch.bfloat16)
    add_head(model, {"task": CLASSES}, seed=0)
    assert model.class_head.out.weight.dtype == torch.float32
    (batch,) = make_batches("roberta", 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = response_loss(model, batch)
    assert loss.dtype == torch.float32
    assert logits(model, batch).dtype == torch.float32


def test_a_mixture_compares_only_the_classes_of_the_rows_task(make_model, make_batches):
    """The oracle: a loss of its own for each task, over a slice of the logits."""
    model = make_model("roberta", DOUBLE)
    add_head(model, {"b": 2, "a": 3}, seed=0)
    with torch.no_grad():
        model.class_head.out.weight.mul_(50)
    (batch,) = make_batches("roberta", 1, DOUBLE, size=4)
    classes = [0, 1, 2, 4]  # two rows of b; two of a, whose classes begin at 2
    batch["labels"][:] = -100
    batch["labels"][:, 1] = torch.tensor(classes)
    found = logits(model, batch)
    rows = [(found[i, :2], c) if c < 2 else (found[i, 2:], c - 2) for i, c in enumerate(classes)]
    expected = torch.stack([-row.log_softmax(-1)[c] for row, c in rows]).mean()
    assert torch.allclose(response_loss(model, batch), expected, rtol=1e-12)
    assert model.class_head.places("a") == slice(2, 5)


def test_classification_loss_is_of_the_first_token(make_model, make_batches):
    model = make_model("roberta", DOUBLE)
    (batch,) = make_batches("roberta", 1, DOUBLE)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    first = model.roberta(**inputs).last_hidden_state[:, 0]
    head = model.class_head
    scores = torch.tanh(first @ head.dense.weight.T + head.dense.bias) @ head.out.weight.T
    expected = -(scores + head.out.bias).log_softmax(-1)[torch.arange(3), batch["labels"][:, 1]]
    assert torch.allclose(response_loss(model, batch), expected.mean(), rtol=1e-12)
    assert model(**inputs).logits.shape == (3, 10, 64)


def test_training_learns_a_class_and_resumes_to_the_byte(base, tmp_path):
    """The trainer itself, killed after half of the steps."""
    task = read_tasks(ROOT / "workflow" / "tasks")["enc_acceptable"]
    prepare(base, task, tmp_path / "data", {"test": 20, "train": 64})
    table, _ = load_split(tmp_path / "data", "train")
    settings = {
        "steps": 8, "batch_size": 8, "accumulation": 1, "schedule": "cosine", "warmup": 0.1,
        "weight_decay": 0.0, "clip": 1.0, "precision": "fp32", "gradient_checkpointing": False,
        "checkpoint_every": 4,
    }  # fmt: skip

    def trainer(path, report=None):
        examples = Examples(
            table["input_ids"][:], table["prompt_length"][:], 1, classes=table["label"][:]
        )
        model = AutoModelForMaskedLM.from_pretrained(base.model.name_or_path)
        add_head(model, {"enc_acceptable": 2}, seed=0)
        return Trainer(head_tuner("lora", model, [], steps=8), examples, settings, 0, path, report)

    def kill(step, total, loss):
        if step == 6:
            raise KeyboardInterrupt

    whole = trainer(tmp_path / "whole")
    losses = whole.run().losses
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "killed", kill).run()
    rest = trainer(tmp_path / "killed")
    outcome = rest.run()
    assert outcome.resumed_from == 4
    assert outcome.losses == losses
    assert same_bytes(rest.tuner.tensors(), whole.tuner.tensors())
    assert set(whole.peaks) == {1e-2, HEAD_RATE}


# --- scores ---------------------------------------------------------------------------------------


def test_masked_tokens_against_a_plain_forward(base, tmp_path):
    task = read_tasks(ROOT / "workflow" / "tasks")["enc_copy"]
    prepare(base, task, tmp_path / "data", {"test": 12})
    scores = score_task(language_model(base, 5), task, tmp_path / "data", "")
    rows, hits, nats, tokens = world.rows("copy", "test", 12), 0, 0.0, 0
    for row, item in zip(rows, scores.items.itertuples(), strict=True):
        inputs = base.tokenizer(row["question"], row["pair"], return_tensors="pt")
        gaps = inputs["input_ids"][0] == base.tokenizer.mask_token_id
        with torch.no_grad():
            logs = base.model(**inputs).logits[0, gaps].log_softmax(-1)
        words = row["response"].split()
        wanted = torch.tensor(base.tokenizer.convert_tokens_to_ids(words))
        found = logs[torch.arange(len(wanted)), wanted]
        assert item.loss == pytest.approx(-found.mean().item(), rel=1e-4)
        assert item.tokens == len(words)
        hits += int((logs.argmax(-1) == wanted).sum())
        nats, tokens = nats - found.sum().item(), tokens + len(words)
    assert scores.summary["value"] == pytest.approx(100 * hits / tokens)
    assert scores.summary["loss"] == pytest.approx(nats / tokens, rel=1e-4)
    one = score_task(language_model(base, 1), task, tmp_path / "data", "")
    assert np.allclose(one.items["loss"], scores.items["loss"], rtol=1e-4)


def test_classes_against_a_plain_forward_and_without_a_head(base, tmp_path):
    task = read_tasks(ROOT / "workflow" / "tasks")["enc_entails"]
    prepare(base, task, tmp_path / "data", {"test": 12})
    rows = world.rows("entails", "test", 12)
    bare = score_task(language_model(base, 5), task, tmp_path / "data", "")
    assert set(bare.items["prediction"]) == {0}
    assert bare.summary["loss"] == pytest.approx(np.log(2))
    assert bare.summary["value"] == pytest.approx(100 * np.mean([not r["answer"] for r in rows]))

    add_head(base.model, {"other": 3, "enc_entails": 2}, seed=0)
    with torch.no_grad():
        base.model.class_head.out.weight.mul_(100)
    scores = score_task(language_model(base, 5), task, tmp_path / "data", "")
    for row, item in zip(rows, scores.items.itertuples(), strict=True):
        inputs = base.tokenizer(row["question"], row["pair"], return_tensors="pt")
        with torch.no_grad():
            logs = base.model.class_logits(**inputs)[0, 3:].log_softmax(-1)
        assert item.loss == pytest.approx(-logs[row["answer"]].item(), rel=1e-3, abs=1e-4)
        assert item.reference == row["answer"]
        assert item.prediction == int(logs.argmax())


def test_metrics_of_classes():
    """By hand: 3 true positives, 1 false positive, 2 false negatives, 4 true negatives."""
    predictions = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    references = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    value, items = metrics.score("f1", predictions, references)
    assert value == pytest.approx(100 * 2 * 3 / (2 * 3 + 1 + 2))
    assert sum(items) == 7
    value, _ = metrics.score("matthews_correlation", predictions, references)
    assert value == pytest.approx(100 * (3 * 4 - 1 * 2) / (4 * 5 * 5 * 6) ** 0.5)
    assert metrics.score("matthews_correlation", [0, 0], [0, 1])[0] == 0
    assert metrics.score("f1", [0, 0], [0, 1])[0] == 0
    assert metrics.score("f1", [0, 1, 2], [0, 1, 2])[0] == 100
    assert metrics.score("masked_token_accuracy", [1, 3], [2, 4])[0] == pytest.approx(100 * 4 / 6)


# --- suite, plan, cell ----------------------------------------------------------------------------

CONFIG = {
    "suite": "tiny",
    "seeds": [0],
    "bases": {
        "enc": {
            "source": {"world": "micro-encoder"},
            "upstream": ["enc_facts"],
            "targets": ["enc_entails"],
        }
    },
    "methods": {"lora": {}},
}


def config_with(**changes) -> dict:
    made = json.loads(json.dumps(CONFIG))
    made["bases"]["enc"] |= changes
    return made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": ["enc_copy"]}, "enc_copy is a task of type masked_token; allowed .* classif"),
        ({"upstream": ["enc_true"]}, "enc_true is a task of type classification; .* masked_token"),
        ({"upstream": ["lm_facts"]}, "lm_facts is a task of type multiple_choice"),
    ],
)
def test_tasks_that_an_encoder_cannot_be_given(changes, message):
    with pytest.raises(SuiteError, match=message):
        load_suite(config_with(**changes), Layout.here())


def test_a_head_rate_belongs_to_encoders():
    made = config_with(upstream=["lm_facts"], targets={"lm_dialect": {"head_learning_rate": 0.1}})
    with pytest.raises(SuiteError, match="head_learning_rate is for targets of encoders only"):
        load_suite(made, Layout.here())


def test_the_plan_names_classes_and_the_heads_rate():
    suite = load_suite(CONFIG, Layout.here())
    (spec,) = [json.loads(text) for text in make_plan(suite)["spec"]]
    assert spec["classes"] == [["enc_entails", 2]]
    assert spec["training"]["head_learning_rate"] == 1e-3
    assert suite.kind("enc") == "encoder"
    other = load_suite(config_with(training={"head_learning_rate": 0.01}), Layout.here())
    assert make_plan(other)["train_key"].iloc[0] != make_plan(suite)["train_key"].iloc[0]


def test_other_bases_know_nothing_of_heads():
    """Their keys hold no word of them, or every stored result would be stale."""
    suite = load_suite(read_config(ROOT / "config" / "config.yaml"), Layout.here())
    for spec in make_plan(suite)["spec"]:
        assert "classes" not in json.loads(spec)
        assert "head_learning_rate" not in json.loads(spec)["training"]


def test_a_classification_without_classes_is_refused(tmp_path):
    path = tmp_path / "odd.yaml"
    about = "{metric: f1, unit: points, direction: higher, title: t, source: {}, classes: [a]}"
    path.write_text(f"task: odd\noutput_type: classification\nmetadata: {about}\n")
    with pytest.raises(SuiteError, match=r"metadata\.classes"):
        read_task(path)


SHORT = {"steps": 3, "batch_size": 4, "examples": 16}


def _cells(folder, micro, methods, targets=None):
    """A suite's plan, its base ready, and cells run in this process."""
    from ballast.cell import run_cell
    from ballast.ready import make_ready, spec_of_base

    layout = Layout(ROOT, folder)
    targets = targets or {"enc_entails": SHORT, "enc_true": SHORT}
    made = config_with(source={"path": str(micro)}, targets=targets)
    made |= {"methods": methods, "evaluation": {"upstream": 8, "downstream": 8, "validation": 4}}
    suite = load_suite(made, layout)
    plan = make_plan(suite).set_index("id", drop=False)
    about = spec_of_base(plan, "enc")
    ready = make_ready(
        **about, tasks=read_tasks(layout.tasks), layout=layout, report=lambda line: None
    )
    place = layout.suite("tiny") / "bases"
    place.mkdir(parents=True)
    (place / "enc.json").write_text(json.dumps(ready))
    return plan, layout, run_cell


class Quiet:
    def note(self, line): ...
    def step(self, step, total, loss): ...


def _classes_of(task):
    return read_tasks(ROOT / "workflow" / "tasks")[task].classes


def test_cells_of_an_encoder_from_data_to_record(tmp_path, micro):
    """Trained, scored, scored again from the store; a post-hoc cell keeps its parent's head."""
    from ballast.cell import cell_folder
    from ballast.files import write_json
    from ballast.records import validate_record
    from ballast.tensorfile import read_tensors

    methods = {"lora": {}, "wise_ft": {"parents": ["lora-r8"], "set": {"alpha": 0.5}}}
    plan, layout, run_cell = _cells(tmp_path, micro, methods)
    stored = {}
    for row in plan.to_dict("records"):
        record = run_cell(row, layout, Quiet())
        validate_record(record)
        write_json(cell_folder(row, layout) / "run.json", record)
        assert set(record["scores"]) == {"enc_facts", row["target"]}
        assert set(record["churn"]) == set(record["scores"])
        changes = json.loads((cell_folder(row, layout) / "changes.json").read_text())
        kinds = [changes[row["target"]][kind] for kind in ("gained", "forgotten")]
        for entry in (entry for entries in kinds for entry in entries):
            assert {entry["before"], entry["after"]} == set(_classes_of(row["target"]))
            assert entry["reference"] in (entry["before"], entry["after"])
            assert "<pad>" not in entry["question"]
        stored[row["target"], row["method"]], _ = read_tensors(
            cell_folder(row, layout) / "adapter.safetensors"
        )
        if row["method"] == "lora":
            assert record["costs"]["head_parameters"] == 128 * 128 + 128 + 128 * 2 + 2
            assert record["settings"]["training"]["head_learning_rate"] == 1e-3
            assert record["costs"]["trainable_parameters"] == 46080
            again = run_cell(row, layout, Quiet())
            assert again["scores"] == record["scores"]
    for target in ("enc_entails", "enc_true"):
        heads = [
            {k: v for k, v in stored[target, method].items() if HEAD in k}
            for method in ("lora", "wise_ft")
        ]
        assert len(heads[0]) == 4
        assert same_bytes(*heads)
    weights = [k for k in stored["enc_true", "wise_ft"] if HEAD not in k]
    assert len(weights) == 18


def test_a_mixture_of_classifications_shares_a_head(tmp_path, micro):
    """Each task has its own classes in it, in training and when it is scored."""
    from ballast.cell import cell_folder
    from ballast.costs import Phases
    from ballast.outcome import ready_base

    targets = {"both": {"tasks": ["enc_true", "enc_entails"], **SHORT}}
    plan, layout, run_cell = _cells(tmp_path, micro, {"lora": {}}, targets)
    (row,) = plan.to_dict("records")
    record = run_cell(row, layout, Quiet())
    assert set(record["scores"]) == {"enc_facts", "enc_true", "enc_entails"}
    assert record["costs"]["head_parameters"] == 128 * 128 + 128 + 128 * 4 + 4
    spec, ready = json.loads(row["spec"]), ready_base(row, layout)
    work = Work(row, spec, layout, cell_folder(row, layout), ready, Phases(), Quiet())
    work.load()
    examples = work.examples()
    for task, classes in (("enc_true", {0, 1}), ("enc_entails", {2, 3})):
        pairs = zip(examples.tasks, examples.classes, strict=True)
        assert {c for t, c in pairs if t == task} == classes


def test_a_post_hoc_method_measures_each_parent_with_its_own_head(tmp_path, micro):
    plan, layout, run_cell = _cells(tmp_path, micro, {"lora": {}})
    rows = {row["target"]: row for row in plan.to_dict("records")}
    for row in rows.values():
        run_cell(row, layout, Quiet())
    row = rows["enc_true"]
    from ballast.cell import cell_folder
    from ballast.costs import Phases
    from ballast.encoders import head_part
    from ballast.outcome import ready_base
    from ballast.tensorfile import read_tensors

    folder = cell_folder(row, layout)
    spec, ready = json.loads(row["spec"]), ready_base(row, layout)
    work = Work(row, spec, layout, folder, ready, Phases(), Quiet())
    work.load()
    heads = {}
    for target, other in rows.items():
        tensors, _ = read_tensors(cell_folder(other, layout) / "adapter.safetensors")
        plain = {k.removeprefix("weight."): v for k, v in tensors.items()}
        heads[target] = head_part(plain)
    for target in ("enc_entails", "enc_true"):
        # Only the own target's data are among the plan's entries of this cell.
        work.ready["tasks"][target] = ready_base(rows[target], layout)["tasks"][target]
        (example,) = work._examples_of(target, 1, heads)
        assert (example["labels"] != -100).sum() == 1
        live = {f"{HEAD}.{k}": v for k, v in work.base.model.class_head.state_dict().items()}
        assert same_bytes(live, heads[target])
        assert list(work.base.model.class_head.classes) == [target]


@pytest.mark.data
@pytest.mark.skipif(
    not os.environ.get("BALLAST_DATA"), reason="BALLAST_DATA names no folder of real data"
)
def test_running_text_is_masked_for_an_encoder_of_a_hub(base, tmp_path):
    """Real text through a base that reads 64 tokens: longer paragraphs are counted, none cut."""
    task = read_tasks(ROOT / "workflow" / "tasks")["wikitext2_masked"]
    made = prepare(base, task, tmp_path / "data", {"test": 300})["splits"]["test"]
    assert made["rows"] + made["too_long"] == 300
    assert made["rows"] > 10
    table, _ = load_split(tmp_path / "data", "test")
    for row in table:
        assert len(row["input_ids"]) <= 64
        assert len(row["positions"]) == max(1, round(0.15 * (len(row["input_ids"]) - 2)))
        assert {row["input_ids"][i] for i in row["positions"]} == {base.tokenizer.mask_token_id}
