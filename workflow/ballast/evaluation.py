"""Scoring a model on a prepared task: lm-eval runs the requests, local metrics score the items.

Encoders are asked by `encoders.EncoderLM`: lm-eval has no masked language models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from torch import Tensor

from ballast import metrics
from ballast.churn import forms
from ballast.data import load_split
from ballast.encoders import EncoderLM
from ballast.files import replacing
from ballast.harness import ImageLM, TextLM
from ballast.tasks import Task


@dataclass
class Scores:
    """A task's summary (as a record holds it) and its items, one row each."""

    summary: dict[str, Any]
    items: pd.DataFrame


def score_task(
    lm: TextLM | ImageLM | EncoderLM,
    task: Task,
    folder: Path,
    delimiter: str,
    split: str = "test",
    rows: Sequence[int] | None = None,
) -> Scores:
    """Score a model on a split of a prepared task, on those `rows` of it alone where given.

    The summary has `value` (the task's metric and unit), `n`, `loss` in nats per token of the true
    response (or of the true class), and for text byte_perplexity. The items have `score` (0 to 1),
    `loss`, `form` (see `churn.FORMS`) and `subject` ("" where the task has none).
    """
    table, features = load_split(folder, split)
    if rows is not None:
        table = table.select(rows)
    scores = _scored(lm, task, table, features, delimiter)
    items = scores.items
    items["form"] = forms(task, items["prediction"], items["reference"])
    items["subject"] = subjects(task, table)
    return scores


def _scored(
    lm: TextLM | ImageLM | EncoderLM,
    task: Task,
    table: datasets.Dataset,
    features: Tensor | None,
    delimiter: str,
) -> Scores:
    if isinstance(lm, EncoderLM):
        return _encoded(lm, task, table)
    if features is not None:
        assert isinstance(lm, ImageLM)
        lm.features = features
    samples = _run(lm, task, table, delimiter)
    if task.rolling:
        assert isinstance(lm, TextLM)
        return _rolling(lm, task, samples)
    if task.output_type == "multiple_choice":
        return _choices(lm, task, samples, delimiter)
    return _generated(lm, task, samples, delimiter)


def subjects(task: Task, table: datasets.Dataset) -> list[str]:
    """The subject of each row: its own, or what `subject_pattern` finds in its question."""
    if "subject" in table.column_names:
        return list(table["subject"])
    if task.subject_pattern is None or "question" not in table.column_names:
        return [""] * len(table)
    found = [re.search(task.subject_pattern, question) for question in table["question"]]
    return [match[match.re.groups] or "" if match else "" for match in found]


def texts_of(task: Task, row: dict[str, Any], tokenizer: Any) -> tuple[str, str]:
    """Question and true answer of a row of a task's table, as a person reads them."""
    if not task.encoder:
        return row["question"], row["response"]
    hidden = set(tokenizer.all_special_ids) - {tokenizer.mask_token_id}
    question = tokenizer.decode([token for token in row["input_ids"] if token not in hidden])
    if task.classes:
        return question, task.classes[row["label"]]
    return question, tokenizer.decode(row["answers"])


def text_of_prediction(task: Task, row: dict[str, Any], prediction: Any) -> str:
    """A prediction (as the items have it) as a person reads it."""
    if task.output_type == "multiple_choice":
        return row["choices"][prediction]
    if task.classes:
        return task.classes[prediction]
    if task.output_type == "masked_token":
        return f"{prediction} of {len(row['answers'])} masked tokens right"
    return str(prediction)


def _encoded(lm: EncoderLM, task: Task, table: datasets.Dataset) -> Scores:
    """An encoder's tasks: gaps filled, or classes named."""
    if task.output_type == "masked_token":
        rows = lm.masked_tokens(table)
    else:
        rows = lm.classes(table, task.name, len(task.classes))
    return _summary(task, pd.DataFrame(rows))


def _run(
    lm: TextLM | ImageLM, task: Task, table: datasets.Dataset, delimiter: str
) -> list[dict[str, Any]]:
    """lm-eval's per-item samples, in the table's order."""
    config = {k: v for k, v in task.config.items() if k not in ("metadata", "dataset_path")}
    config |= {
        "custom_dataset": lambda **_: datasets.DatasetDict({"test": table}),
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": task.metadata.get("version", 1)},
    }
    config.pop("validation_split", None)
    if task.rolling:
        # Unused; lm-eval's own choice raises where a perplexity is beyond all numbers.
        config["metric_list"] = [{"metric": "bits_per_byte"}]
    else:
        config["target_delimiter"] = delimiter
    manager = TaskManager(include_defaults=False)
    results = evaluator.evaluate(lm=lm, task_dict=manager.load([config]), bootstrap_iters=0)
    return sorted(results["samples"][task.name], key=lambda sample: sample["doc_id"])


def _tokens(lm: TextLM | ImageLM, prompt: str, continuation: str) -> int:
    return len(lm._encode_pair(prompt, continuation)[1])


def _choices(
    lm: TextLM | ImageLM, task: Task, samples: list[dict[str, Any]], delimiter: str
) -> Scores:
    """Multiple choice: the choice with the highest log-likelihood."""
    rows = []
    for sample in samples:
        doc, logs = sample["doc"], [float(answer[0]) for answer in sample["filtered_resps"]]
        # A choice that is no number has no place in the order, whichever choice is true.
        true = math.nan if any(map(math.isnan, logs)) else logs[doc["answer"]]
        tokens = _tokens(lm, doc["prompt"], delimiter + doc["choices"][doc["answer"]])
        rows.append(
            {
                "item": sample["doc_id"],
                "prediction": max(range(len(logs)), key=logs.__getitem__),
                "reference": doc["answer"],
                "loglikelihoods": logs,
                "loss": -true / tokens,
                "tokens": tokens,
            }
        )
    return _summary(task, pd.DataFrame(rows))


def _generated(
    lm: TextLM | ImageLM, task: Task, samples: list[dict[str, Any]], delimiter: str
) -> Scores:
    """Generation: text against text, and the loss of the true response beside it."""
    requests = []
    for sample in samples:
        doc = sample["doc"]
        arguments = (doc["prompt"], delimiter + doc["response"])
        if isinstance(lm, ImageLM):
            arguments += ({"visual": doc["image"]},)
        requests.append(Instance("loglikelihood", doc, arguments, 0))
    logs = lm.loglikelihood(requests, disable_tqdm=True)
    rows = []
    for sample, (log, _) in zip(samples, logs, strict=True):
        doc = sample["doc"]
        tokens = _tokens(lm, doc["prompt"], delimiter + doc["response"])
        rows.append(
            {
                "item": sample["doc_id"],
                "prediction": str(sample["filtered_resps"][0]).strip(),
                "reference": doc["response"],
                "loss": -log / tokens,
                "tokens": tokens,
            }
        )
    scores = _summary(task, pd.DataFrame(rows))
    answered = sum(bool(text) for text in scores.items["prediction"])
    scores.summary["answered"] = 100 * answered / len(scores.items)
    return scores


def _rolling(lm: TextLM, task: Task, samples: list[dict[str, Any]]) -> Scores:
    """Running text: next-token accuracy, nats per token, perplexity per byte."""
    rows = []
    for sample in samples:
        text = sample["doc"]["text"]
        tokens, hits = lm.rolling[text]
        total = -float(sample["resps"][0][0])
        rows.append(
            {
                "item": sample["doc_id"],
                "prediction": hits,
                "reference": tokens,
                "loss": total / tokens,
                "tokens": tokens,
                "bytes": len(text.encode("utf-8")),
            }
        )
    scores = _summary(task, pd.DataFrame(rows))
    nats = float((scores.items["loss"] * scores.items["tokens"]).sum(skipna=False))
    scores.summary["byte_perplexity"] = _exp(nats / int(scores.items["bytes"].sum()))
    return scores


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _summary(task: Task, items: pd.DataFrame) -> Scores:
    """The task's metric over the items, and the loss per token over all their tokens."""
    value, scores = metrics.score(task.metric, items["prediction"], items["reference"])
    items["score"] = scores
    # One item that is no number makes the task's loss none: such a model has no result.
    nats = (items["loss"] * items["tokens"]).sum(skipna=False)
    loss = float(nats / items["tokens"].sum())
    return Scores({"value": value, "n": len(items), "loss": loss}, items)


def write_items(scores: Scores, path: Path) -> None:
    """Store the items of a task, one row each, as parquet."""
    with replacing(path) as temporary:
        scores.items.to_parquet(temporary, index=False)
