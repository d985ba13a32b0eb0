"""Encoders: a masked language model with a classification head beside it.

The model stays the one that its base is: asked without `labels` it fills masked tokens, as upstream
tasks do. A head (`add_head`) is added where a cell is trained to classify: RoBERTa's, a dense layer
with tanh and a linear one over the last feature of the first token. It is drawn from the cell's
seed, trained in full by every method at one rate (`head_learning_rate` of the suite's training
settings, so that a method's own rate does not decide how well its head learns), stored with the
adapter, and counted apart: a method knows nothing of it, and `trainable_parameters` leaves it out.

Batches of a classification have `labels` in the shape of a decoder's [rows, tokens], with one that
counts in each row: its class, at the second place. Whoever counts or picks labelled tokens, shifted
by one or not, finds it.

Scores are computed here: lm-eval has no masked language models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from ballast.context import Context
from ballast.errors import BallastError
from ballast.models import Base
from ballast.tuner import WEIGHT, Tuner

HEAD = "class_head"
HEAD_LEARNING_RATE = 1e-3
IGNORED = -100


class ClassHead(nn.Module):
    """Classes of a sequence from its features [rows, tokens, width] -> [rows, classes].

    classes: number of classes by task; the head of a mixture has those of all its tasks one after
    another, and only those of a row's own task compete for it.
    """

    segments: Tensor  # [classes]: number of the task that each class belongs to

    def __init__(self, width: int, classes: Mapping[str, int]) -> None:
        super().__init__()
        self.classes = dict(classes)
        self.dense = nn.Linear(width, width)
        self.out = nn.Linear(width, sum(classes.values()))
        sizes = torch.tensor(list(classes.values()))
        segments = torch.arange(len(sizes)).repeat_interleave(sizes)
        self.register_buffer("segments", segments, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        first = features[:, 0].to(self.dense.weight.dtype)
        return self.out(torch.tanh(self.dense(first)))

    def places(self, task: str) -> slice:
        """Which of the classes are those of a task."""
        names = list(self.classes)
        start = sum(self.classes[name] for name in names[: names.index(task)])
        return slice(start, start + self.classes[task])

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy, nats, in at least fp32; labels [rows, tokens] as said above."""
        kept = labels != IGNORED
        classes = labels[kept]
        if len(classes) != len(logits):
            raise BallastError(f"labels: {len(classes)} classes in {len(logits)} rows")
        logits = logits if logits.dtype == torch.float64 else logits.float()
        other = self.segments != self.segments[classes][:, None]
        return nn.functional.cross_entropy(logits.masked_fill(other, float("-inf")), classes)


class Classifies:
    """What a head adds to a masked-LM class: with `labels` it classifies, without it fills gaps."""

    class_head: ClassHead

    def class_logits(self, **inputs: Tensor) -> Tensor:
        """Logits of all classes, [rows, classes]; inputs as the base model takes them."""
        return self.class_head(self.base_model(**inputs).last_hidden_state)

    def forward(self, *args: Any, labels: Tensor | None = None, **inputs: Any) -> Any:
        if labels is None:
            return super().forward(*args, **inputs)
        from transformers.modeling_outputs import SequenceClassifierOutput

        names = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds")
        logits = self.class_logits(**{name: inputs[name] for name in names if name in inputs})
        return SequenceClassifierOutput(loss=self.class_head.loss(logits, labels), logits=logits)


def add_head(model: nn.Module, classes: Mapping[str, int], seed: int) -> None:
    """Give a masked language model a fresh head, in place; it is never in less than fp32."""
    from ballast.training import derived_seed

    head = ClassHead(model.config.hidden_size, classes)
    generator = torch.Generator().manual_seed(derived_seed(seed, "head"))
    with torch.no_grad():
        for layer in (head.dense, head.out):
            # Not the base's own 0.02: on a narrow base next to no gradient would pass the head.
            layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
    dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
    model.class_head = head.to(model.device, dtype)
    kind = type(model)
    if not issubclass(kind, Classifies):
        model.__class__ = type(kind.__name__, (Classifies, kind), {"__module__": __name__})


def head_part(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The tensors of a head among a model's, or among stored ones with their prefix."""
    return {k: v for k, v in tensors.items() if k.startswith(f"{prefix}{HEAD}.")}


class HeadTuner(Tuner):
    """A method at work on an encoder, and beside it the head, which the method never sees."""

    def __init__(self, method: ModuleType, ctx: Context, learning_rate: float) -> None:
        super().__init__(method, ctx)
        self.head_learning_rate = learning_rate

    @property
    def head(self) -> ClassHead:
        return self.ctx.model.class_head

    def start(self) -> None:
        super().start()
        self.head.requires_grad_(True)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        stored = head_part(tensors, WEIGHT)
        super().restore({k: v for k, v in tensors.items() if k not in stored})
        prefix = f"{WEIGHT}{HEAD}."
        self.head.load_state_dict({k.removeprefix(prefix): v for k, v in stored.items()})
        self.head.requires_grad_(True)

    def tensors(self) -> dict[str, Tensor]:
        own = {
            f"{WEIGHT}{HEAD}.{k}": v.detach().cpu().clone()
            for k, v in self.head.state_dict().items()
        }
        return dict(sorted((super().tensors() | own).items()))

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        named = dict(self.head.named_parameters(prefix=HEAD))
        group = {
            "params": list(named.values()),
            "names": list(named),
            "lr": self.head_learning_rate,
            "weight_decay": weight_decay,
        }
        return [*super().parameter_groups(weight_decay), group]

    def head_count(self) -> int:
        """How many numbers the head has; all of them train."""
        return sum(p.numel() for p in self.head.parameters())


class EncoderLM:
    """A base that is asked for masked tokens and classes, in batches of like length."""

    def __init__(self, base: Base, batch_size: int) -> None:
        self.model, self.tokenizer, self.batch_size = base.model, base.tokenizer, batch_size

    @torch.no_grad()
    def masked_tokens(self, table: datasets.Dataset) -> list[dict[str, Any]]:
        """By row of the table: how many masked tokens are ranked first, of how many, nats each."""
        found: list[dict[str, Any]] = [{}] * len(table)
        for rows, inputs in self._batches(table):
            logits = self.model(**inputs).logits
            for row, item in zip(logits, rows, strict=True):
                record = table[item]
                logs = row[record["positions"]].float().log_softmax(-1)
                wanted = torch.tensor(record["answers"], device=logs.device)
                found[item] = {
                    "item": item,
                    "prediction": int((logs.argmax(-1) == wanted).sum()),
                    "reference": len(wanted),
                    "loss": -float(logs.gather(1, wanted[:, None]).double().mean()),
                    "tokens": len(wanted),
                }
        return found

    @torch.no_grad()
    def classes(self, table: datasets.Dataset, task: str, count: int) -> list[dict[str, Any]]:
        """By row of the table: predicted and true class, and the true one's loss in nats.

        A base without a head knows no classes: all are equally likely to it, and the first counts
        as its prediction.
        """
        found: list[dict[str, Any]] = [{}] * len(table)
        head = getattr(self.model, HEAD, None)
        for rows, inputs in self._batches(table):
            if head is None:
                logs = torch.zeros(len(rows), count).log_softmax(-1)
            else:
                logits = self.model.class_logits(**inputs)[:, head.places(task)]
                logs = logits.float().log_softmax(-1).cpu()
            for row, item in zip(logs, rows, strict=True):
                label = table[item]["label"]
                found[item] = {
                    "item": item,
                    "prediction": int(row.argmax()),
                    "reference": label,
                    "loglikelihoods": [float(value) for value in row],
                    "loss": -float(row[label]),
                    "tokens": 1,
                }
        return found

    def _batches(self, table: datasets.Dataset) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Rows of the table and their right-padded inputs, the longest first."""
        lengths = [len(ids) for ids in table["input_ids"]]
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        names = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0}
        if "token_type_ids" in table.column_names:
            names["token_type_ids"] = 0
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            chunk = table.select(rows)
            columns = {k: chunk[k] for k in names if k != "attention_mask"}
            columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
            yield (
                rows,
                {
                    k: nn.utils.rnn.pad_sequence(
                        [torch.tensor(ids) for ids in columns[k]],
                        batch_first=True,
                        padding_value=pad,
                    ).to(self.model.device)
                    for k, pad in names.items()
                },
            )
