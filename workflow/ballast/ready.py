"""A base made ready for its cells: the model itself, its data, and its own untouched scores.

Every step is kept under a key of its own content and skipped where it is done: a suite that adds a
task prepares and scores that task alone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

import ballast.quiet  # noqa: F401  (first: the libraries read its settings when imported)
from ballast.bases.build import make_base
from ballast.data import check_overlaps, prepare_task
from ballast.errors import DataError
from ballast.files import read_json, write_json
from ballast.layout import Layout
from ballast.locks import held
from ballast.tasks import Task

Report = Callable[[str], None]
SCORES, VALIDATION, ITEMS = "scores.json", "validation.json", "items.parquet"


def spec_of_base(plan: pd.DataFrame, name: str) -> dict[str, Any]:
    """What `make_ready` needs of a plan's base: its source, key, and the tasks of all its cells."""
    specs = [json.loads(text) for text in plan.loc[plan["base"] == name, "spec"]]
    entries: dict[str, dict[str, Any]] = {}
    for spec in specs:
        entries |= spec["tasks"]
    first = specs[0]
    return {
        "name": name,
        "spec": {key: first.get(key) for key in ("source", "template", "delimiter", "end", "gate")},
        "key": first["base_key"],
        "entries": entries,
        "batch_size": first["evaluation"]["batch_size"],
    }


def make_ready(
    name: str,
    spec: dict[str, Any],
    key: str,
    entries: dict[str, dict[str, Any]],
    tasks: dict[str, Task],
    layout: Layout,
    report: Report,
    batch_size: int,
    threads: int = 1,
) -> dict[str, Any]:
    """Make base, data and untouched scores; returns what cells need to know of them.

    The base is held meanwhile: another suite that needs it waits, and finds it made.
    Raises DataError if a base pretrained here misses its gate, with all scores in the message.
    """
    with held(layout.base(name, key), name, report):
        return _ready(name, spec, key, entries, tasks, layout, report, batch_size, threads)


def _ready(
    name: str,
    spec: dict[str, Any],
    key: str,
    entries: dict[str, dict[str, Any]],
    tasks: dict[str, Task],
    layout: Layout,
    report: Report,
    batch_size: int,
    threads: int,
) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    made = make_base(spec, layout.base(name, key), report)
    folders = {
        task: layout.data(name, key, task, entry["data_key"]) for task, entry in entries.items()
    }
    load = functools.cache(lambda: _load(Path(made["model"])))
    manifests = {
        task: prepare_task(load, spec, tasks[task], entry, folders[task], report)
        for task, entry in entries.items()
    }
    check_overlaps(folders, [t for t, entry in entries.items() if entry["role"] == "target"])
    scores = _scores(name, spec, key, entries, tasks, layout, report, folders, load, batch_size)
    _check_gate(name, spec, entries, scores)
    return {
        "base": name,
        "base_key": key,
        "model": made["model"],
        "files": made["files"],
        "seconds": made["seconds"],
        "tasks": {
            task: {"folder": str(folders[task]), "manifest": manifests[task], **found}
            for task, found in scores.items()
        },
    }


def _scores(
    name: str,
    spec: dict[str, Any],
    key: str,
    entries: dict[str, dict[str, Any]],
    tasks: dict[str, Task],
    layout: Layout,
    report: Report,
    folders: dict[str, Path],
    load: Callable[[], Any],
    batch_size: int,
) -> dict[str, dict[str, Any]]:
    """The untouched base's scores and the file of its items by task, from the store or made now.

    Tasks with a validation split have `validation_scores` too: what `tune` compares its cells to.
    """
    places = {
        task: layout.scores(name, key, task, f"{entry['eval_key']}-{entry['data_key']}")
        for task, entry in entries.items()
    }
    files = {task: {"test": SCORES} for task in entries}
    for task, entry in entries.items():
        if "validation" in entry["sizes"]:
            files[task]["validation"] = VALIDATION
    due = [
        (task, split)
        for task, own in files.items()
        for split, file in own.items()
        if not (places[task] / file).exists()
    ]
    if due:
        from ballast.evaluation import score_task, write_items
        from ballast.harness import language_model
        from ballast.models import use_stored_features
        from ballast.template import template_for

        base = load()
        if base.multimodal:
            use_stored_features(base)
        lm = language_model(base, batch_size)
        encoder = base.anatomy.kind == "encoder"
        delimiter = "" if encoder else template_for(base.tokenizer, spec).delimiter
        for task, split in due:
            scores = score_task(lm, tasks[task], folders[task], delimiter, split)
            if split == "test":
                write_items(scores, places[task] / ITEMS)
            write_json(places[task] / files[task][split], scores.summary)
            report(f"untouched, {task} {split}: {scores.summary['value']:.1f}")
    return {
        task: {"scores": read_json(place / SCORES), "items": str(place / ITEMS)}
        | (
            {"validation_scores": read_json(place / VALIDATION)}
            if "validation" in files[task]
            else {}
        )
        for task, place in places.items()
    }


def _load(folder: Path) -> Any:
    from ballast.models import load_base

    return load_base(folder)


def _check_gate(
    name: str,
    spec: dict[str, Any],
    entries: dict[str, dict[str, Any]],
    scores: dict[str, dict[str, Any]],
) -> None:
    gate = spec.get("gate")
    if gate is None:
        return
    upstream = {
        t: scores[t]["scores"]["value"]
        for t, entry in entries.items()
        if entry["role"] == "upstream"
    }
    if min(upstream.values()) < gate:
        shown = ", ".join(f"{task} {value:.1f}" for task, value in upstream.items())
        raise DataError(
            f"base {name} must reach {gate} on every upstream task and reached {shown}; "
            "what a base cannot do cannot be forgotten"
        )
