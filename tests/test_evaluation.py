"""Scores against plain forward passes of the original model, done by hand one by one."""

from __future__ import annotations

import copy
import json
import math

import datasets
import numpy as np
import pytest
import torch
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ballast import metrics, sources
from ballast.bases import micro_lm, micro_vlm
from ballast.data import load_split, prepare_task
from ballast.errors import DataError
from ballast.evaluation import score_task, write_items
from ballast.harness import TextLM, language_model
from ballast.models import FeatureTower, load_base, tower_features, use_stored_features
from ballast.records import not_finite
from ballast.tasks import Task
from ballast.template import Template, template_for
from ballast.worlds import text as world
from tiny import randomise, tuner_of

SPEC = {"template": "chat", "delimiter": " "}
KINDS = {
    "multiple_choice": {"doc_to_choice": "choices", "doc_to_target": "answer"},
    "generate_until": {
        "doc_to_target": "response",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 16},
    },
    "loglikelihood_rolling": {"doc_to_text": "", "doc_to_target": "text"},
}


def task_of(kind: str, metric: str, source: dict, tmp_path, image: bool = False) -> Task:
    config = {"task": kind, "output_type": kind, "doc_to_text": "prompt"} | KINDS[kind]
    if image:
        config["doc_to_image"] = "image"
    config["metadata"] = {"metric": metric, "unit": "points", "source": source}
    return Task(kind, tmp_path, config, "")


def jsonl(rows: list[dict], path) -> dict:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return {"reader": "jsonl", "train": str(path), "test": str(path)}


@torch.no_grad()
def _sharpen(model, ends: int) -> None:
    """Random weights whose answers differ: large, and now and then the end of the text."""
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    head = model.get_output_embeddings().weight
    head[ends] *= 1.5


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_base")
    tokenizer = micro_lm.build_tokenizer()
    model = micro_lm.build_model(tokenizer)
    _sharpen(model, tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_base")
    tokenizer = micro_vlm.build_tokenizer()
    model = micro_vlm.build_model(tokenizer)
    _sharpen(model, tokenizer.eos_token_id)
    model.save_pretrained(folder)
    micro_vlm.build_processor(tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def text_base(text_folder):
    return load_base(text_folder)


@pytest.fixture
def image_base(image_folder):
    return load_base(image_folder)


def prepare(base, task, folder, sizes, spec=SPEC, max_length=None):
    entry = {"sizes": sizes, "max_length": max_length}
    return prepare_task(lambda: base, spec, task, entry, folder, lambda line: None)


@torch.no_grad()
def by_hand(model, prompt: list[int], response: list[int], **image) -> np.ndarray:
    """Log-probability of each response token after the prompt, one plain forward pass."""
    ids = torch.tensor([prompt + response])
    logs = model(input_ids=ids, **image).logits[0].double().log_softmax(-1)
    return np.array([logs[len(prompt) + i - 1, t].item() for i, t in enumerate(response)])


# --- text: multiple choice and generation --------------------------------------------------------


@pytest.fixture
def facts(text_base, tmp_path):
    """(task, folder, rows) of multiple choice on the text base, choices of one and two words."""
    rows = world.rows("arithmetic", "test", 12) + world.rows("facts", "test", 12)
    task = task_of("multiple_choice", "accuracy", jsonl(rows, tmp_path / "a.jsonl"), tmp_path)
    prepare(text_base, task, tmp_path / "facts", {"test": None})
    return task, tmp_path / "facts", rows


def test_multiple_choice_is_the_argmax_of_likelihoods_by_hand(text_base, facts):
    task, folder, rows = facts
    scores = score_task(language_model(text_base, 5), task, folder, " ")
    ids = text_base.tokenizer.get_vocab()
    right, nats, tokens = [], 0.0, 0
    for row, item in zip(rows, scores.items.itertuples(), strict=True):
        prompt = ["<bos>", "<user>", *row["question"].split(), "<assistant>"]
        prompt = [ids[word] for word in prompt]
        logs = [
            by_hand(text_base.model, prompt, [ids[word] for word in choice.split()])
            for choice in row["choices"]
        ]
        sums = [log.sum() for log in logs]
        assert np.allclose(item.loglikelihoods, sums, atol=1e-4)
        assert item.prediction == int(np.argmax(sums))
        assert item.reference == row["answer"]
        own = logs[row["answer"]]
        assert item.tokens == len(own)
        assert item.loss == pytest.approx(-own.mean(), abs=1e-4)
        right.append(item.prediction == row["answer"])
        nats, tokens = nats - own.sum(), tokens + len(own)
    assert scores.summary["value"] == pytest.approx(100 * np.mean(right))
    assert 0 < scores.summary["value"] < 100
    assert scores.summary["loss"] == pytest.approx(nats / tokens, abs=1e-4)
    assert scores.summary["n"] == len(rows) == 24


def stock(base, task, folder, delimiter=" "):
    """The task's results by lm-eval's own model and metric."""
    table, _ = load_split(folder, "test")
    config = {k: v for k, v in task.config.items() if k != "metadata"} | {
        "custom_dataset": lambda **_: datasets.DatasetDict({"test": table}),
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": delimiter,
        "metadata": {"version": 1},
    }
    lm = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=3)
    made = TaskManager(include_defaults=False).load([config])
    return evaluator.evaluate(lm=lm, task_dict=made, bootstrap_iters=0)["results"][task.name]


def test_multiple_choice_is_lm_evals_own_accuracy(text_base, facts):
    task, folder, _ = facts
    task.config["metric_list"] = [
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    ]
    ours = score_task(language_model(text_base, 7), task, folder, " ").summary["value"]
    assert ours == pytest.approx(100 * stock(text_base, task, folder)["acc,none"])


def test_scores_do_not_depend_on_the_batch_size(text_base, facts):
    task, folder, _ = facts
    one, many = (score_task(language_model(text_base, n), task, folder, " ") for n in (1, 64))
    assert one.summary["value"] == many.summary["value"]
    assert one.summary["loss"] == pytest.approx(many.summary["loss"], abs=1e-5)


def test_generated_text_and_its_loss_by_hand(text_base, tmp_path):
    rows = world.rows("copy", "test", 12)
    rows[3] = rows[3] | {"response": rows[3]["response"] + " " + rows[4]["response"]}
    task = task_of("generate_until", "exact_match", jsonl(rows, tmp_path / "a"), tmp_path)
    prepare(text_base, task, tmp_path / "copy", {"test": None})
    scores = score_task(language_model(text_base, 5), task, tmp_path / "copy", " ")
    ids, lengths, nats = text_base.tokenizer.get_vocab(), [], []
    for row, item in zip(rows, scores.items.itertuples(), strict=True):
        prompt = [ids[w] for w in f"<bos> <user> {row['question']} <assistant>".split()]
        made = text_base.model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[
            0, len(prompt) :
        ]
        words = text_base.tokenizer.decode(made, skip_special_tokens=True)
        assert item.prediction == words.strip()
        lengths.append(len(made))
        logs = by_hand(text_base.model, prompt, [ids[w] for w in row["response"].split()])
        assert item.loss == pytest.approx(-logs.mean(), abs=1e-4)
        nats += list(-logs)
    assert min(lengths) < max(lengths) == 16  # some end by themselves, some are cut
    assert scores.summary["loss"] == pytest.approx(np.mean(nats), abs=1e-4)
    assert scores.summary["answered"] == 100 * np.mean([bool(t) for t in scores.items.prediction])


def test_an_exact_answer_counts(text_base, tmp_path):
    """What the model itself says, given as the reference, scores 100."""
    rows = world.rows("copy", "test", 6)
    task = task_of("generate_until", "exact_match", jsonl(rows, tmp_path / "a"), tmp_path)
    prepare(text_base, task, tmp_path / "one", {"test": None})
    said = score_task(language_model(text_base, 4), task, tmp_path / "one", " ").items.prediction
    kept = [r | {"response": s} for r, s in zip(rows, said, strict=True) if s]
    task = task_of("generate_until", "exact_match", jsonl(kept, tmp_path / "b"), tmp_path)
    prepare(text_base, task, tmp_path / "two", {"test": None})
    scores = score_task(language_model(text_base, 4), task, tmp_path / "two", " ")
    assert scores.summary["value"] == 100
    assert list(scores.items.score) == [1.0] * len(kept)


# --- text: running -------------------------------------------------------------------------------


def test_rolling_likelihood_by_hand(text_base, tmp_path):
    """Texts shorter than, equal to, just above and well above the 64 positions of the base."""
    words, random = world.vocabulary(), np.random.default_rng(2)
    texts = [" ".join(random.choice(words, size)) for size in (5, 63, 64, 65, 150)]
    source = jsonl([{"text": text} for text in texts], tmp_path / "a.jsonl")
    task = task_of("loglikelihood_rolling", "next_token_accuracy", source, tmp_path)
    prepare(text_base, task, tmp_path / "running", {"test": None})
    lm = language_model(text_base, 3)
    assert lm.max_length == 64
    scores = score_task(lm, task, tmp_path / "running", " ")
    ids = text_base.tokenizer.get_vocab()
    nats, counts, hits = [], [], []
    for item_text, item in zip(texts, scores.items.itertuples(), strict=True):
        tokens = [ids["<bos>"], *(ids[w] for w in item_text.split())]
        logs, firsts, start = [], 0, 1
        while start < len(tokens):
            end = min(start + 64, len(tokens))
            seen = max(0, end - 1 - 64)  # the last piece sees as much as fits
            with torch.no_grad():
                logits = text_base.model(torch.tensor([tokens[seen : end - 1]])).logits[0]
            logits = logits[start - 1 - seen :].double().log_softmax(-1)
            for row, token in zip(logits, tokens[start:end], strict=True):
                logs.append(row[token].item())
                firsts += int(row.argmax().item() == token)
            start = end
        assert (item.reference, item.tokens) == (len(logs), len(logs))
        assert item.prediction == firsts
        assert item.bytes == len(item_text.encode())
        assert item.loss == pytest.approx(-np.mean(logs), abs=1e-4)
        assert item.score == pytest.approx(firsts / len(logs))
        nats.append(-sum(logs))
        counts.append(len(logs))
        hits.append(firsts)
    size = sum(len(text.encode()) for text in texts)
    assert scores.summary["value"] == pytest.approx(100 * sum(hits) / sum(counts))
    assert scores.summary["loss"] == pytest.approx(sum(nats) / sum(counts), abs=1e-4)
    assert scores.summary["byte_perplexity"] == pytest.approx(math.exp(sum(nats) / size), rel=1e-4)
    assert sum(hits) > 0
    task.config["metric_list"] = [{"metric": "byte_perplexity"}]
    theirs = stock(text_base, task, tmp_path / "running")["byte_perplexity,none"]
    assert scores.summary["byte_perplexity"] == pytest.approx(theirs, rel=1e-4)


# --- images --------------------------------------------------------------------------------------


def vision_rows(task: str, count: int) -> list[dict]:
    return sources.rows({"reader": "world", "world": "micro-vlm", "task": task}, "test", count)


def image_task(kind, metric, task, tmp_path):
    source = {"reader": "world", "world": "micro-vlm", "task": task}
    return task_of(kind, metric, source, tmp_path, image=True)


def asked(base, row: dict) -> dict:
    """Model inputs by the processor's own chat template and pictures: ids and pixel_values."""
    content = [{"type": "image", "image": row["image"]}, {"type": "text", "text": row["question"]}]
    return base.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@pytest.fixture
def stored(image_folder):
    """The image base over stored features: its tower is gone."""
    base = load_base(image_folder)
    use_stored_features(base)
    return base


def test_image_likelihoods_are_those_of_the_real_tower(image_base, stored, tmp_path):
    task = image_task("multiple_choice", "accuracy", "color", tmp_path)
    prepare(image_base, task, tmp_path / "color", {"test": 10})
    assert not list(stored.model.get_submodule(stored.anatomy.tower).parameters())
    scores = score_task(language_model(stored, 4), task, tmp_path / "color", " ")
    ids = image_base.tokenizer.get_vocab()
    right = []
    for row, item in zip(vision_rows("color", 10), scores.items.itertuples(), strict=True):
        inputs = asked(image_base, row)
        assert inputs["pixel_values"].shape == (1, 3, 32, 32)
        prompt = inputs["input_ids"][0].tolist()
        sums = [
            by_hand(
                image_base.model, prompt, [ids[choice]], pixel_values=inputs["pixel_values"]
            ).sum()
            for choice in row["choices"]
        ]
        assert np.allclose(item.loglikelihoods, sums, atol=1e-4)
        assert item.prediction == int(np.argmax(sums))
        right.append(item.prediction == row["answer"])
        blind = by_hand(
            image_base.model,
            prompt,
            [ids[row["response"]]],
            pixel_values=inputs["pixel_values"] * 0,
        )
        assert abs(blind.sum() - sums[row["answer"]]) > 1e-3  # the picture is looked at
    assert scores.summary["value"] == pytest.approx(100 * np.mean(right))


def test_longer_image_answers_share_a_pass_and_keep_their_likelihoods(image_base, stored, tmp_path):
    task = image_task("generate_until", "exact_match", "inventory", tmp_path)
    rows = vision_rows("inventory", 6)
    prepare(image_base, task, tmp_path / "inventory", {"test": 6})
    scores = score_task(language_model(stored, 4), task, tmp_path / "inventory", " ")
    ids = image_base.tokenizer.get_vocab()
    for row, item in zip(rows, scores.items.itertuples(), strict=True):
        inputs = asked(image_base, row)
        response = [ids[w] for w in row["response"].split()]
        logs = by_hand(
            image_base.model,
            inputs["input_ids"][0].tolist(),
            response,
            pixel_values=inputs["pixel_values"],
        )
        assert item.tokens == len(response) > 2
        assert item.loss == pytest.approx(-logs.mean(), abs=1e-4)


def test_generation_with_images_is_one_by_one_generation(image_base, stored, tmp_path, monkeypatch):
    task = image_task("generate_until", "rouge_l", "inventory", tmp_path)
    rows = vision_rows("inventory", 14)
    for row in rows[::3]:  # prompts of unlike lengths in one batch
        row["question"] = "count the objects"
    monkeypatch.setattr(sources, "rows", lambda *_: rows)
    prepare(image_base, task, tmp_path / "inventory", {"test": 14})
    scores = score_task(language_model(stored, 4), task, tmp_path / "inventory", " ")
    lengths = []
    for row, item in zip(rows, scores.items.itertuples(), strict=True):
        inputs = asked(image_base, row)
        made = image_base.model.generate(
            **inputs,
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=image_base.tokenizer.eos_token_id,
            pad_token_id=image_base.tokenizer.pad_token_id,
        )[0, inputs["input_ids"].shape[1] :]
        lengths.append(len(made))
        words = image_base.tokenizer.decode(made, skip_special_tokens=True)
        assert item.prediction == words.strip()
    assert min(lengths) < max(lengths) == 16  # in one batch some end, and the others go on


@pytest.mark.parametrize("strategy", ["full", "default"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_stored_features_take_the_layer_and_tokens_of_the_configuration(
    strategy, layer, image_folder, tmp_path
):
    """`default` drops the first token, as for towers with a class token (LLaVA-1.5)."""
    base, replaced = load_base(image_folder), load_base(image_folder)
    for made in (base, replaced):
        made.model.config.vision_feature_layer = layer
        made.model.config.vision_feature_select_strategy = strategy
    pictures = [row["image"] for row in vision_rows("color", 3)]
    features = tower_features(replaced, pictures, batch=2)
    tokens = 4 if strategy == "full" else 3
    assert features.shape == (3, tokens, 128)
    use_stored_features(replaced)
    assert isinstance(replaced.model.get_submodule(replaced.anatomy.tower), FeatureTower)
    ids = base.tokenizer.get_vocab()
    prompt = [ids["<bos>"], ids["<user>"], *[ids["<image>"]] * tokens, ids["<assistant>"]]
    prompt = torch.tensor([prompt] * 3)
    pixels = base.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = base.model(input_ids=prompt, pixel_values=pixels).logits
        found = replaced.model(input_ids=prompt, pixel_values=features).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_one_picture_is_stored_once(image_base, tmp_path):
    """Rows that show the same picture share its features."""
    rows = vision_rows("color", 4)
    image_base.processor.image_processor(rows[0]["image"], return_tensors="pt")
    task = image_task("multiple_choice", "accuracy", "color", tmp_path)
    doubled = [*rows, rows[1] | {"question": "color of top-left ?"}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "rows", lambda *_: doubled)
        prepare(image_base, task, tmp_path / "color", {"test": 5})
    table, features = load_split(tmp_path / "color", "test")
    assert table["image"][:] == [0, 1, 2, 3, 1]
    assert len(features) == 4


# --- prompts and training examples ---------------------------------------------------------------


@pytest.fixture(scope="module")
def byte_pair():
    """A byte-pair tokenizer that adds <s> by itself; its words begin with their space."""
    inner = Tokenizer(BPE(unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    inner.train_from_iterator(["Q: what is it? A: it is a cat\nanswer: yes, cats\n"] * 9, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(scope="module")
def harness(byte_pair):
    """harness(class of lm-eval or ours) -> a language model over `byte_pair`."""
    config = LlamaConfig(
        vocab_size=len(byte_pair),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    return lambda kind: kind(pretrained=model, tokenizer=byte_pair, batch_size=1)


PROMPTS = (
    "Q: {question} A:",
    "<s>Q: {question} A:",
    "Q: {question}\nanswer:\n",  # as chat templates end
    "Q: {question}\nanswer: \n\n ",
    "Q: {question} answer: ",
)


@pytest.mark.parametrize("delimiter", [" ", "", "\n"])
@pytest.mark.parametrize("text", PROMPTS)
def test_examples_are_split_as_lm_eval_splits_them(text, delimiter, byte_pair, harness):
    template = Template(byte_pair, text, delimiter)
    for question, response in (("what is it?", "yes, it is"), ("it", "is not"), ("é ", "cat")):
        prompt = template.prompt(question, image=False)
        head, tail = template.encode(prompt, response)
        for kind in (HFLM, TextLM):
            assert (head, tail) == harness(kind)._encode_pair(prompt, delimiter + response)
        assert head[0] == byte_pair.bos_token_id
        assert byte_pair.bos_token_id not in (head + tail)[1:]
        whole = prompt.removeprefix("<s>") + delimiter + response
        assert byte_pair.decode(head[1:] + tail) == whole


@pytest.mark.parametrize(("prompt", "response"), [("it is a c", "at"), ("a ca", "t"), ("ye", "s")])
def test_a_token_across_the_seam_loses_no_text(prompt, response, byte_pair, harness):
    """There lm-eval's own context and continuation do not add up to the text; ours do."""
    split = Template(byte_pair, "{question}", "").encode(prompt, response)
    assert split == harness(TextLM)._encode_pair(prompt, response)
    assert byte_pair.decode(split[0][1:] + split[1]) == prompt + response
    assert split[1]
    theirs = harness(HFLM)._encode_pair(prompt, response)
    assert byte_pair.decode(theirs[0][1:] + theirs[1]) != prompt + response


@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_training_example_is_the_evaluation_prompt_and_the_response(
    kind, text_base, image_base, tmp_path
):
    base, sizes = (text_base if kind == "text" else image_base), {"train": 12, "test": 5}
    if kind == "text":
        path = tmp_path / "rows.jsonl"
        source = jsonl(world.rows("reverse", "train", 14), path)
        source["test"] = jsonl(world.rows("reverse", "test", 5), tmp_path / "test")["test"]
        task = task_of("generate_until", "exact_match", source, tmp_path)
    else:
        source = {"reader": "world", "world": "micro-vlm", "task": "inventory"}
        task = image_task("generate_until", "exact_match", "inventory", tmp_path)
    prepare(base, task, tmp_path / "data", sizes)
    made, features = load_split(tmp_path / "data", "train")
    # The same rows, asked as test items: what evaluation sends to the model.
    twin = copy.deepcopy(task)
    with pytest.MonkeyPatch.context() as patch:
        trained = sources.rows(source, "train", 12)
        patch.setattr(sources, "rows", lambda *_: trained)
        prepare(base, twin, tmp_path / "twin", {"test": 12})
    tested, _ = load_split(tmp_path / "twin", "test")
    lm = language_model(base, 2)
    eos = base.tokenizer.eos_token_id
    for example, item in zip(made, tested, strict=True):
        head, tail = lm._encode_pair(item["prompt"], " " + item["response"])
        assert example["input_ids"] == [*head, *tail, eos]
        assert example["prompt_length"] == len(head)
        assert example["image"] == item["image"]
        if kind == "image":
            placeholders = example["input_ids"].count(base.tokenizer.image_token_id)
            assert placeholders == features.shape[1] == 4
    rendered = {item["prompt"] for item in tested}
    assert len(rendered) > 1
    assert made.num_rows == 12


def test_examples_over_the_limit_are_dropped_and_counted(text_base, tmp_path):
    rows = world.rows("reverse", "train", 30)
    sizes = [len(f"{r['question']} {r['response']}".split()) + 4 for r in rows]
    limit = sorted(set(sizes))[0]
    task = task_of("generate_until", "exact_match", jsonl(rows, tmp_path / "a"), tmp_path)
    manifest = prepare(text_base, task, tmp_path / "r", {"test": None}, max_length=limit)
    kept = sum(size <= limit for size in sizes)
    assert 0 < kept < 30
    assert manifest["splits"]["test"]["rows"] == kept
    assert manifest["splits"]["test"]["too_long"] == 30 - kept
    with pytest.raises(DataError, match=r"every row is longer than 3 tokens"):
        prepare(text_base, task, tmp_path / "none", {"test": None}, max_length=3)


def test_the_templates_hash_is_of_what_is_asked(text_base, image_base):
    plain = template_for(text_base.tokenizer, SPEC)
    other = template_for(text_base.tokenizer, {"template": "Q {question} A", "delimiter": " "})
    tight = template_for(text_base.tokenizer, {"template": "chat", "delimiter": ""})
    image = template_for(image_base.tokenizer, SPEC, 4)
    assert len({t.digest() for t in (plain, other, tight, image)}) == 4
    assert plain.digest() == template_for(text_base.tokenizer, SPEC).digest()
    assert plain.prompt("copy bax", False) == "<bos> <user> copy bax <assistant>"
    assert image.prompt("x", True) == "<bos> <user> " + "<image>" * 4 + " x <assistant>"


def test_a_missing_chat_template_is_refused(byte_pair):
    with pytest.raises(DataError, match="no chat template"):
        template_for(byte_pair, {"template": "chat"})


# --- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_adapter_is_what_is_scored_merged_or_not(
    kind, method, text_base, image_base, stored, tmp_path
):
    if kind == "text":
        base, sizes = text_base, {"test": 24}
        source = jsonl(world.rows("arithmetic", "test", 24), tmp_path / "a")
        task = task_of("multiple_choice", "accuracy", source, tmp_path)
        prepare(base, task, tmp_path / "data", sizes)
    else:
        base = stored
        task = image_task("multiple_choice", "accuracy", "color", tmp_path)
        prepare(image_base, task, tmp_path / "data", {"test": 24})

    def scored():
        return score_task(language_model(base, 8), task, tmp_path / "data", " ").items

    before = scored()
    tuner = tuner_of(method, base.model, [])
    tuner.start()
    assert np.allclose(stacked(scored()), stacked(before), atol=1e-3)
    randomise(tuner)
    tuned = scored()
    assert not np.allclose(stacked(tuned), stacked(before), atol=0.1)
    assert list(tuned.prediction) != list(before.prediction)
    tuner.merge()
    merged = scored()
    assert np.allclose(stacked(merged), stacked(tuned), atol=1e-3)
    assert list(merged.prediction) == list(tuned.prediction)


def stacked(items) -> np.ndarray:
    return np.stack(list(items.loglikelihoods))


def test_items_are_stored_one_row_each(text_base, facts, tmp_path):
    import pandas as pd

    task, folder, _ = facts
    scores = score_task(language_model(text_base, 8), task, folder, " ")
    write_items(scores, tmp_path / "items.parquet")
    read = pd.read_parquet(tmp_path / "items.parquet")
    assert list(read["item"]) == list(range(24))
    assert 100 * read["score"].mean() == pytest.approx(scores.summary["value"])


# --- metrics against their libraries -------------------------------------------------------------

WORDS = (
    "red fox and",
    "red  fox and ",
    "fox",
    "a red fox",
    "Red fox and",
    "",
    "runs running",
    "é ü",
)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_one_item_that_is_no_number_is_never_left_out(kind, text_base, tmp_path):
    """A model that overflows on one word has no loss, whatever its other items say."""
    rows = world.rows("copy", "test", 6)
    rows = [row | {"choices": [row["response"], "red"], "answer": 0} for row in rows]
    rows = [row | {"text": row["question"]} for row in rows]
    metric = {"multiple_choice": "accuracy", "generate_until": "exact_match"}
    metric = metric.get(kind, "next_token_accuracy")
    task = task_of(kind, metric, jsonl(rows, tmp_path / "a"), tmp_path)
    prepare(text_base, task, tmp_path / "task", {"test": None})
    words = [set(row["question"].split()) for row in rows]
    word = min(words[0] - set().union(*words[1:]))
    broken = text_base.tokenizer.get_vocab()[word]

    def overflow(module, arguments, output):
        return output.masked_fill((arguments[0] == broken)[..., None], math.nan)

    text_base.model.get_input_embeddings().register_forward_hook(overflow)
    scores = score_task(language_model(text_base, 1), task, tmp_path / "task", " ")
    assert list(scores.items["loss"].isna()) == [True] + [False] * 5
    assert not_finite(scores.summary, "") == "loss"


def test_one_choice_that_is_no_number_makes_its_item_none(text_base, facts, monkeypatch):
    task, folder, _ = facts
    lm = language_model(text_base, 64)
    likelihoods = lm.loglikelihood

    def first_overflows(requests, **options):
        found = likelihoods(requests, **options)
        wrong = requests[0].doc["answer"] == 0  # the first request is of choice 0
        return [(math.nan, False) if i == wrong else pair for i, pair in enumerate(found)]

    monkeypatch.setattr(lm, "loglikelihood", first_overflows)
    scores = score_task(lm, task, folder, " ")
    assert list(scores.items["loss"].isna()) == [True] + [False] * 23
    assert not_finite(scores.summary, "") == "loss"


def test_a_loss_beyond_all_perplexities_is_no_error(text_base, tmp_path):
    rows = [{"text": row["question"]} for row in world.rows("copy", "test", 3)]
    task = task_of(
        "loglikelihood_rolling", "next_token_accuracy", jsonl(rows, tmp_path / "a"), tmp_path
    )
    prepare(text_base, task, tmp_path / "task", {"test": None})
    with torch.no_grad():
        text_base.model.get_output_embeddings().weight.mul_(1e6)
    scores = score_task(language_model(text_base, 3), task, tmp_path / "task", " ")
    assert math.isfinite(scores.summary["loss"])
    assert not_finite(scores.summary, "") == "byte_perplexity"


def test_accuracy_is_scikit_learns():
    random = np.random.default_rng(0)
    predictions, references = random.integers(0, 5, 100), random.integers(0, 5, 100)
    value, items = metrics.score("accuracy", list(predictions), list(references))
    assert value == pytest.approx(100 * accuracy_score(references, predictions))
    assert 0 < value < 100
    assert value == pytest.approx(100 * np.mean(items))


def test_exact_match_counts_equal_texts_but_for_white_space():
    pairs = [(p, r) for p in WORDS for r in WORDS]
    value, items = metrics.score("exact_match", *zip(*pairs, strict=True))
    equal = [" ".join(p.split()) == " ".join(r.split()) for p, r in pairs]
    assert items == [float(e) for e in equal]
    assert value == pytest.approx(100 * accuracy_score([1] * len(pairs), equal))
    assert metrics.score("exact_match", ["Yes"], ["yes"])[0] == 0  # case counts


def test_rouge_l_is_that_of_rouge_score():
    pairs = [(p, r) for p in WORDS for r in WORDS]
    value, items = metrics.score("rouge_l", *zip(*pairs, strict=True))
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = [scorer.score(target=r, prediction=p)["rougeL"].fmeasure for p, r in pairs]
    assert items == pytest.approx(expected)
    assert value == pytest.approx(100 * np.mean(expected))
    # By hand: common subsequence "red fox" of 3 and 3 words.
    assert metrics.score("rouge_l", ["red big fox"], ["red fox and"])[1][0] == pytest.approx(2 / 3)


def test_next_token_accuracy_weighs_every_token_equally():
    value, items = metrics.score("next_token_accuracy", [1, 90], [10, 100])
    assert items == pytest.approx([0.1, 0.9])
    assert value == pytest.approx(100 * 91 / 110)
    assert metrics.score("next_token_accuracy", [3, 4], [6, 6])[0] == pytest.approx(100 * 7 / 12)


@pytest.mark.parametrize("name", ["accuracy", "exact_match", "rouge_l"])
def test_the_items_mean_is_the_value(name):
    pairs = [(0, 1), (2, 2), (1, 1)] if name == "accuracy" else [("a b", "a b"), ("a c", "c d")]
    value, items = metrics.score(name, *zip(*pairs, strict=True))
    assert len(items) == len(pairs)
    assert value == pytest.approx(100 * np.mean(items))
    assert 0 < value < 100


def test_an_unknown_metric_is_refused():
    with pytest.raises(DataError, match="allowed: accuracy, exact_match"):
        metrics.score("bleu", [1], [1])
