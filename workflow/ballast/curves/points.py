"""Scoring a cell's model at the points of a curve, on all test items or on some of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ballast import metrics
from ballast.cell import Work
from ballast.costs import Phases
from ballast.curves import SCORE
from ballast.errors import DataError
from ballast.files import sha256_file
from ballast.layout import Layout
from ballast.outcome import cell_folder, ready_base
from ballast.tasks import Task, read_tasks

Scores = dict[str, dict[str, Any]]


def chosen_rows(count: int, wanted: int | None) -> list[int] | None:
    """Which `wanted` of a task's `count` rows are scored, the same ones always; None: all."""
    if wanted is None or wanted >= count:
        return None
    return sorted(np.random.default_rng(0).choice(count, wanted, replace=False).tolist())


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode, then every mode and random state as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(python)
            np.random.set_state(numpy)


class Scorer:
    """Scores a cell's tasks with whatever weights its model has at the moment.

    work: a cell whose base is loaded; items: how many test items of each task, None for all.
    """

    def __init__(self, work: Work, layout: Layout, items: int | None) -> None:
        self.work, self.layout = work, layout
        self.tasks: dict[str, Task] = read_tasks(layout.tasks)
        self.rows = {
            name: chosen_rows(work.ready["tasks"][name]["scores"]["n"], items)
            for name in work.spec["tasks"]
        }

    def __call__(self) -> Scores:
        """Value, n and loss by task; leaves modes and random states of the model alone."""
        from ballast.evaluation import score_task
        from ballast.harness import language_model
        from ballast.template import template_for

        base, spec = self.work.base, self.work.spec
        encoder = base.anatomy.kind == "encoder"
        delimiter = "" if encoder else template_for(base.tokenizer, spec).delimiter
        found = {}
        # What trains is in fp32 even in a bf16 base: it is scored as it trains.
        low = spec["training"]["precision"] == "bf16"
        with undisturbed(base.model), torch.autocast(base.model.device.type, torch.bfloat16, low):
            lm = language_model(base, spec["evaluation"]["batch_size"])
            for name, rows in self.rows.items():
                folder = Path(self.work.ready["tasks"][name]["folder"])
                scores = score_task(lm, self.tasks[name], folder, delimiter, rows=rows)
                found[name] = {key: scores.summary[key] for key in SCORE}
        return found

    def base_scores(self, record: dict[str, Any]) -> Scores:
        """Those of the untouched base, from what it was scored on when it was made ready."""
        return {
            name: record["base_scores"][name]
            if rows is None
            else self._of_items(name, Path(self._base_items(name)), rows)
            for name, rows in self.rows.items()
        }

    def end_scores(self, record: dict[str, Any]) -> Scores:
        """Those of the finished cell, from its record or its items.

        Raises DataError if a file of items is not the one that the record describes.
        """
        found = {}
        for name, rows in self.rows.items():
            if rows is None:
                found[name] = record["scores"][name]
                continue
            file = f"samples/{name}.parquet"
            path = self.work.folder / file
            if not path.is_file() or sha256_file(path) != record["files"][file]:
                raise DataError(f"{path}: missing, or not the file that the record describes")
            found[name] = self._of_items(name, path, rows)
        return found

    def _base_items(self, name: str) -> str:
        ready = self.work.ready["tasks"][name]
        if "items" not in ready:
            raise DataError(
                f"base {self.work.row['base']}: its items of {name} are not known; "
                "run the suite again"
            )
        return ready["items"]

    def _of_items(self, name: str, path: Path, rows: list[int]) -> dict[str, Any]:
        """The score of some of the stored items, as `evaluation` makes it of all."""
        items = pd.read_parquet(path).set_index("item").loc[rows]
        value, _ = metrics.score(self.tasks[name].metric, items["prediction"], items["reference"])
        loss = float((items["loss"] * items["tokens"]).sum(skipna=False) / items["tokens"].sum())
        return {"value": value, "n": len(items), "loss": loss}


def work_on(row: dict[str, Any], spec: dict[str, Any], layout: Layout, report: Any) -> Work:
    """A cell at work, its base loaded and nothing attached."""
    folder, ready = cell_folder(row, layout), ready_base(row, layout)
    work = Work(row, spec, layout, folder, ready, Phases(), report)
    work.load()
    return work
