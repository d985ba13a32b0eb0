"""A cell's items against those of the untouched base: what it stores of them, and its churn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from ballast.churn import changes_of, churn_of
from ballast.data import load_split
from ballast.errors import Damaged, DataError
from ballast.evaluation import Scores, text_of_prediction, texts_of
from ballast.files import set_aside, sha256_file, write_json
from ballast.items import CHANGES, ITEMS, beside_base, write_items
from ballast.tasks import Task


class Comparison:
    """Gathers a cell's tasks one by one, each compared with the untouched base's items."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.items: list[pd.DataFrame] = []
        self.churn: dict[str, dict[str, Any]] = {}
        self.changes: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def add(self, task: Task, scores: Scores, ready: dict[str, Any]) -> None:
        """Compare the test items of a task.

        ready: the task's entry of the ready base. Raises DataError if the base's items are missing
        or other ones.
        """
        path = Path(ready.get("items", ""))
        if not path.is_file():
            raise DataError(
                f"{task.name}: the untouched base's items are missing ({path}); "
                "remove the suite's bases/*.json and run again"
            )
        if "items_sha256" in ready and sha256_file(path) != ready["items_sha256"]:
            set_aside(path)
            raise Damaged(
                f"{path}: damaged: the content does not fit its checksum; it is set aside as "
                "*.damaged, and made again by the next run"
            )
        base = pd.read_parquet(path)
        items = beside_base(task.name, scores.items, base)
        self.items.append(items)
        if task.running:
            return
        table, _ = load_split(Path(ready["folder"]), "test")
        before, after = (i.set_index("item")["prediction"] for i in (base, scores.items))

        def texts(item: int) -> dict[str, str]:
            row = table[item]
            question, reference = texts_of(task, row, self.tokenizer)
            return {
                "question": question,
                "reference": reference,
                "before": text_of_prediction(task, row, before[item]),
                "after": text_of_prediction(task, row, after[item]),
            }

        self.churn[task.name] = churn_of(items)
        self.changes[task.name] = changes_of(items, texts)

    def store(self, folder: Path) -> dict[str, str]:
        """Write items and changes of the gathered tasks; the files' hashes by name."""
        if not self.items:
            return {}
        write_items(pd.concat(self.items, ignore_index=True), folder / ITEMS)
        write_json(folder / CHANGES, self.changes)
        return {name: sha256_file(folder / name) for name in (ITEMS, CHANGES)}
