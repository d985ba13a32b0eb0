"""The training loop: the same for every method, resumable to the byte.

Data order, dropout and schedule depend on the cell's seed and settings alone, never on the method,
so that two methods of a suite see the same batches in the same order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ballast.checkpoint import read_checkpoint, write_checkpoint
from ballast.errors import Diverged
from ballast.tuner import Tuner

IGNORED = -100
GROUPING = 50  # batches that are sorted by length together: longer groups save no more padding


def derived_seed(seed: int, purpose: str) -> int:
    """An independent 63-bit seed for one purpose (adapter, order, dropout) of a cell's seed."""
    digest = hashlib.sha256(f"{purpose}-{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass
class Examples:
    """Tokenised training examples in memory.

    input_ids: token ids per example; prompt_lengths: how many of them carry no loss; images: row of
    `features` [images, tokens, width] per example, or None for text; tasks: each one's task;
    classes: its class, for classification, where no token carries loss; token_types: 0 or 1 by
    token, for encoders that tell two sentences apart by them.
    """

    input_ids: list[np.ndarray]
    prompt_lengths: list[int]
    pad: int
    images: list[int] | None = None
    features: Tensor | None = None
    tasks: list[str] | None = None
    classes: list[int] | None = None
    token_types: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, rows: np.ndarray, device: torch.device) -> dict[str, Tensor]:
        """Right-padded batch [rows, longest]: input_ids, attention_mask, labels, pixel_values.

        Labels of a classification: the class at each row's second place (see `encoders`).
        """
        longest = max(len(self.input_ids[i]) for i in rows)
        ids = np.full((len(rows), longest), self.pad, dtype=np.int64)
        mask = np.zeros((len(rows), longest), dtype=np.int64)
        labels = np.full((len(rows), longest), IGNORED, dtype=np.int64)
        for place, row in enumerate(rows):
            tokens, start = self.input_ids[row], self.prompt_lengths[row]
            ids[place, : len(tokens)] = tokens
            mask[place, : len(tokens)] = 1
            labels[place, start : len(tokens)] = tokens[start:]
        if self.classes is not None:
            labels[:, 1] = [self.classes[row] for row in rows]
        made = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.token_types is not None:
            made["token_type_ids"] = np.zeros_like(ids)
            for place, row in enumerate(rows):
                types = self.token_types[row]
                made["token_type_ids"][place, : len(types)] = types
        batch = {k: torch.from_numpy(v).to(device) for k, v in made.items()}
        if self.features is not None and self.images is not None:
            batch["pixel_values"] = self.features[[self.images[i] for i in rows]].to(device)
        return batch


def joined(parts: list[Examples]) -> Examples:
    """The examples of several tasks as one set, in the order of the tasks."""
    first = parts[0]
    if len(parts) == 1:
        return first
    images, offset = [], 0
    if first.images is not None:
        for part in parts:
            images += [place + offset for place in part.images]
            offset += len(part.features)
    return dataclasses.replace(
        first,
        input_ids=[ids for part in parts for ids in part.input_ids],
        prompt_lengths=[n for part in parts for n in part.prompt_lengths],
        images=images or None,
        features=torch.cat([part.features for part in parts]) if images else None,
        tasks=[task for part in parts for task in part.tasks],
        classes=_together([part.classes for part in parts]),
        token_types=_together([part.token_types for part in parts]),
    )


def _together(parts: list[list[Any] | None]) -> list[Any] | None:
    return None if None in parts else [item for part in parts for item in part]


def single_examples(
    examples: Examples, count: int, seed: int, device: torch.device, task: str | None = None
) -> Iterator[dict[str, Tensor]]:
    """Up to `count` examples one by one, of one task or of all, in an order that the seed draws."""
    order = np.concatenate(batch_order([1] * len(examples), 1, len(examples), seed))
    if task is not None:
        order = [row for row in order if examples.tasks and examples.tasks[row] == task]
    for row in order[:count]:
        yield examples.batch(np.array([row]), device)


def batch_order(lengths: list[int], batch: int, count: int, seed: int) -> list[np.ndarray]:
    """The first `count` batches of rows for a seed: epochs of permutations, grouped by length.

    Within a group of `GROUPING` batches rows are sorted by length, and the batches then shuffled,
    so that padding is small and the order still random. An epoch's last, short batch is left out
    unless it is the only one.
    """
    generator = np.random.default_rng(derived_seed(seed, "order"))
    sizes = np.asarray(lengths)
    batches: list[np.ndarray] = []
    while len(batches) < count:
        order = generator.permutation(len(sizes))
        epoch: list[np.ndarray] = []
        for start in range(0, len(order), batch * GROUPING):
            group = order[start : start + batch * GROUPING]
            group = group[np.argsort(-sizes[group], kind="stable")]
            epoch += [group[i : i + batch] for i in range(0, len(group), batch)]
        full = [rows for rows in epoch if len(rows) == batch] or epoch
        batches += [full[i] for i in generator.permutation(len(full))]
    return batches[:count]


def rate_factor(schedule: str, warmup: int, total: int, step: int) -> float:
    """Share of the peak rate at step `step`, from 0: linear warm-up, then the schedule."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + float(np.cos(np.pi * progress)))
    return 1 - progress if schedule == "linear" else 1.0


def response_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the response tokens of a batch, nats, computed in at least fp32.

    For an encoder with a head: over the classes of the batch.
    """
    if hasattr(model, "class_head"):
        return model(**batch).loss
    labels = batch["labels"][:, 1:]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    kept = labels != IGNORED
    # Only the scored positions are raised to fp32: with a large vocabulary most of the memory.
    chosen = logits[kept]
    return nn.functional.cross_entropy(
        chosen if chosen.dtype == torch.float64 else chosen.float(), labels[kept]
    )


@dataclass
class Outcome:
    """What training measured: losses per step, seconds per step, and when the first step ended."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    resumed_from: int = 0


class Trainer:
    """Trains a `Tuner` on examples; may be stopped at any moment and continued from a checkpoint.

    settings: the training block of a cell's spec; checkpoint: file of the latest state, or None.
    report(step, total, loss) is called after every step.
    """

    def __init__(
        self,
        tuner: Tuner,
        examples: Examples,
        settings: dict[str, Any],
        seed: int,
        checkpoint: Path | None = None,
        report: Callable[[int, int, float], None] | None = None,
    ) -> None:
        self.tuner, self.examples, self.settings, self.seed = tuner, examples, settings, seed
        self.checkpoint, self.report = checkpoint, report
        self.model = tuner.ctx.model
        self.device = next(self.model.parameters()).device
        self.autocast = settings["precision"] == "bf16"
        self.total = settings["steps"]
        self.warmup = round(settings["warmup"] * self.total)
        self.order = batch_order(
            [len(ids) for ids in examples.input_ids],
            settings["batch_size"],
            self.total * settings["accumulation"],
            seed,
        )
        self.outcome = Outcome()
        self.optimiser: torch.optim.AdamW | None = None

    def prepare(self) -> None:
        """Attach the method, fresh or from the latest checkpoint, and build the optimiser."""
        stored = read_checkpoint(self.checkpoint) if self.checkpoint else None
        torch.manual_seed(derived_seed(self.seed, "dropout"))
        self.tuner.ctx.batches = self._calibration
        if stored is None:
            self.tuner.start()
        else:
            self.tuner.restore(stored.tensors)
        if self.settings["gradient_checkpointing"]:
            self.model.activation_checkpointing_enable()
        groups = self.tuner.parameter_groups(self.settings["weight_decay"])
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, foreach=True)
        self.peaks = [group["lr"] for group in self.optimiser.param_groups]
        if stored is not None:
            self._continue(stored)

    def run(self) -> Outcome:
        """Train to the last step. Raises Diverged when loss or gradient is not a finite number."""
        if self.optimiser is None:
            self.prepare()
        self.model.train()
        ctx = self.tuner.ctx
        while ctx.step < self.total:
            self._step()
            due = ctx.step % self.settings["checkpoint_every"] == 0
            if self.checkpoint and due and ctx.step < self.total:
                self._save()
        self.model.eval()
        return self.outcome

    def _step(self) -> None:
        started = time.perf_counter()
        ctx, count = self.tuner.ctx, self.settings["accumulation"]
        factor = rate_factor(self.settings["schedule"], self.warmup, self.total, ctx.step)
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.optimiser.zero_grad(set_to_none=True)
        mean = 0.0
        for micro in range(count):
            batch = self.examples.batch(self.order[ctx.step * count + micro], self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = response_loss(self.model, batch)
            penalty = self.tuner.penalty()
            (loss if penalty is None else loss + penalty).div(count).backward()
            mean += loss.item() / count
            self.outcome.tokens += int(batch["attention_mask"].sum())
        self.tuner.after_backward()
        norm = self._clip()
        if not (np.isfinite(mean) and np.isfinite(norm)):
            raise Diverged(
                f"step {ctx.step + 1}: loss {mean:.4g}, gradient norm {norm:.4g}; "
                "a smaller learning rate or precision: fp32 may help"
            )
        self.optimiser.step()
        ctx.step += 1
        self.tuner.after_step()
        self.outcome.losses.append(mean)
        self.outcome.step_seconds.append(time.perf_counter() - started)
        if self.report:
            self.report(ctx.step, self.total, mean)

    def _clip(self) -> float:
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        limit = self.settings["clip"] or float("inf")
        return float(nn.utils.clip_grad_norm_(parameters, limit, foreach=True))

    def _calibration(self, examples: int, task: str | None = None) -> Iterator[dict[str, Tensor]]:
        """Training examples one by one, for `calibrate` and reports."""
        return single_examples(self.examples, examples, self.seed, self.device, task)

    def _save(self) -> None:
        assert self.checkpoint is not None
        write_checkpoint(
            self.checkpoint,
            tensors=self.tuner.tensors(),
            optimiser=self.optimiser,
            step=self.tuner.ctx.step,
            measured=dataclasses.asdict(self.outcome),
            generator=self.tuner.ctx.generator,
        )

    def _continue(self, stored: Any) -> None:
        """Put the optimiser, the random states and the step count back."""
        stored.restore_optimiser(self.optimiser)
        stored.restore_random(self.tuner.ctx.generator)
        self.tuner.ctx.step = stored.step
        self.outcome = Outcome(**stored.measured)
        self.outcome.resumed_from = stored.step
