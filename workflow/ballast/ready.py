"""A base made ready for its cells: the model itself, its data, and its own untouched scores.

Every step is kept under a key of its own content and skipped where it is done: a suite that adds a
task prepares and scores that task alone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

import ballast.quiet  # noqa: F401  (first: the libraries read its settings when imported)
from ballast.bases.build import WEIGHTS, make_base
from ballast.data import check_overlaps, prepare_task
from ballast.errors import Damaged, DataError
from ballast.files import (
    read_seal,
    read_sealed,
    remove_parts,
    set_aside,
    sha256_file,
    write_sealed,
)
from ballast.layout import Layout
from ballast.locks import held
from ballast.outcome import LOWER
from ballast.records import NAME, not_finite
from ballast.tasks import Task

Report = Callable[[str], None]
Entries = dict[str, dict[str, Any]]  # by task: the plan's entry
SCORES, VALIDATION, ITEMS = "scores.json", "validation.json", "items.parquet"
DIGEST = "items_sha256"


def spec_of_base(plan: pd.DataFrame, name: str) -> dict[str, Any]:
    """What `make_ready` needs of a plan's base: its source, key, and the tasks of all its cells,
    by the precision that they run in."""
    specs = [json.loads(text) for text in plan.loc[plan["base"] == name, "spec"]]
    entries: dict[str, Entries] = {}
    for spec in specs:
        entries.setdefault(spec["training"]["precision"], {}).update(spec["tasks"])
    first = specs[0]
    return {
        "name": name,
        "spec": {key: first.get(key) for key in ("source", "template", "delimiter", "end", "gate")},
        "key": first["base_key"],
        "entries": entries,
        "batch_size": first["evaluation"]["batch_size"],
        "device": first["training"]["device"],
    }


def gpus_of_base(plan: pd.DataFrame, name: str) -> int:
    """How many GPUs making a plan's base ready gets."""
    specs = plan.loc[plan["base"] == name, "spec"]
    return json.loads(specs.iloc[0])["base_limits"]["gpus"]


@dataclass(frozen=True)
class _Work:
    """What all steps of making a base ready share; the arguments of `make_ready`."""

    name: str
    spec: dict[str, Any]
    key: str
    tasks: dict[str, Task]
    layout: Layout
    report: Report
    batch_size: int
    device: str


def make_ready(
    name: str,
    spec: dict[str, Any],
    key: str,
    entries: dict[str, Entries],
    tasks: dict[str, Task],
    layout: Layout,
    report: Report,
    batch_size: int,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, Any]:
    """Make base, data and untouched scores; returns what cells need to know of them.

    entries: the plan's entries of tasks by precision (`fp32`, `bf16`): in each the base is loaded,
    its tower read and its scores made, as its cells run. device: where, as they do (`auto`, `cpu`
    or `cuda`). The base is held meanwhile: another suite that needs it waits, and finds it made.
    Raises DataError if a base pretrained here misses its gate, with all scores in the message.
    """
    work = _Work(name, spec, key, tasks, layout, report, batch_size, device)
    with held(layout.base(name, key), name, report):
        return _ready(work, entries, threads)


def _ready(work: _Work, entries: dict[str, Entries], threads: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    folder = work.layout.base(work.name, work.key)
    remove_parts(folder)
    made = make_base(work.spec, folder, work.report)
    _check_cells(work.name, work.key, made, work.layout)
    found = {
        precision: _tasks(work, own, precision, Path(made["model"]))
        for precision, own in entries.items()
    }
    full = found.pop("fp32", {})
    return {
        "base": work.name,
        "base_key": work.key,
        "model": made["model"],
        "source": made["source"],
        **({"commit": made["commit"]} if "commit" in made else {}),
        "files": made["files"],
        "seconds": made["seconds"],
        "tasks": full,
        **({LOWER: found} if found else {}),
    }


def _tasks(work: _Work, entries: Entries, precision: str, model: Path) -> dict[str, dict[str, Any]]:
    """Data and untouched scores of tasks for the cells of one precision."""
    folders = {
        task: work.layout.data(work.name, work.key, task, entry["data_key"])
        for task, entry in entries.items()
    }
    for folder in folders.values():
        remove_parts(folder)
    load = functools.cache(lambda: _load(model, precision, work.device))
    manifests = {
        task: prepare_task(load, work.spec, work.tasks[task], entry, folders[task], work.report)
        for task, entry in entries.items()
    }
    check_overlaps(folders, [t for t, entry in entries.items() if entry["role"] == "target"])
    scores = _scores(work, entries, precision, folders, load)
    _check_gate(work, entries, precision, scores)
    return {
        task: {"folder": str(folders[task]), "manifest": manifests[task], **made}
        for task, made in scores.items()
    }


def _scores(
    work: _Work,
    entries: Entries,
    precision: str,
    folders: dict[str, Path],
    load: Callable[[], Any],
) -> dict[str, dict[str, Any]]:
    """The untouched base's scores and the file of its items by task, from the store or made now.

    Tasks with a validation split have `validation_scores` too: what `tune` compares its cells to.
    """
    places = {
        task: work.layout.scores(work.name, work.key, task, _scores_key(entry))
        for task, entry in entries.items()
    }
    for place in places.values():
        remove_parts(place)
    files = {task: {"test": SCORES} for task in entries}
    for task, entry in entries.items():
        if "validation" in entry["sizes"]:
            files[task]["validation"] = VALIDATION
    found: dict[str, dict[str, Any]] = {task: {} for task in entries}
    due = []
    for task, own in files.items():
        for split, file in own.items():
            found[task][split] = _stored(places[task], task, file, work.report)
            if found[task][split] is None:
                due.append((task, split))
    if due:
        from ballast.evaluation import score_task, write_items
        from ballast.harness import language_model
        from ballast.models import use_stored_features
        from ballast.template import template_for

        base = load()
        if base.multimodal:
            use_stored_features(base)
        lm = language_model(base, work.batch_size)
        encoder = base.anatomy.kind == "encoder"
        delimiter = "" if encoder else template_for(base.tokenizer, work.spec).delimiter
        for task, split in due:
            scores = score_task(lm, work.tasks[task], folders[task], delimiter, split)
            kept = found[task][split] = dict(scores.summary)
            if split == "test":
                write_items(scores, places[task] / ITEMS)
                kept[DIGEST] = sha256_file(places[task] / ITEMS)
            _check_finite(work.name, task, kept)
            of = {"of": [task, files[task][split]]}
            write_sealed(places[task] / files[task][split], of | kept)
            value = f"{scores.summary['value']:.1f}{_named(precision)}"
            work.report(f"untouched, {task} {split}: {value}")
    return {task: _entry(place, found[task]) for task, place in places.items()}


def _scores_key(entry: dict[str, Any]) -> str:
    """Key of a task's stored scores; its first part tells a precision lower than fp32."""
    return f"{entry['eval_key']}-{entry['data_key']}"


def _named(precision: str) -> str:
    """What a line says of a precision: nothing of fp32."""
    return "" if precision == "fp32" else f" in {precision}"


def _entry(place: Path, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What cells need of a task's scores: by split, and where its items are."""
    made = {"scores": {k: v for k, v in found["test"].items() if k != DIGEST}}
    made |= {"items": str(place / ITEMS)}
    made |= {DIGEST: found["test"][DIGEST]} if DIGEST in found["test"] else {}
    return made | ({"validation_scores": found["validation"]} if "validation" in found else {})


def _stored(place: Path, task: str, file: str, report: Report) -> dict[str, Any] | None:
    """Scores that an earlier run stored; None if there are none, or they or their items are
    damaged, which are set aside."""
    if not (place / file).exists():
        return None
    try:
        found = read_sealed(place / file)
        if found.pop("of", [task, file]) != [task, file]:
            raise Damaged(f"{place / file}: holds the scores of another task")
        if file == SCORES:
            check_items(place / ITEMS, found)
    except Damaged as error:
        set_aside(place / file)
        report(f"{error}; set aside, scored again")
        return None
    return found


def check_items(path: Path, entry: dict[str, Any]) -> None:
    """Raise Damaged if the untouched base's items are not those of its scores.

    Scores of earlier versions do not say which file they belong to.
    """
    if not path.is_file():
        raise Damaged(f"{path}: missing; the untouched base's items of a task")
    if DIGEST in entry and sha256_file(path) != entry[DIGEST]:
        raise Damaged(f"{path}: damaged: the content does not fit its checksum")


def _check_cells(name: str, key: str, made: dict[str, Any], layout: Layout) -> None:
    """Refuse a base of this key that has other weights than those that cells were trained from.

    So it is where the folder of a base was removed and its source has moved on since.
    """
    weights = {k: v for k, v in made["files"].items() if k.endswith(WEIGHTS)}
    for path in sorted(layout.results.glob(f"*/cells/{name}.*/{NAME}")):
        try:
            record, _ = read_seal(path)
            files = record["provenance"]["base"]["files"]
            if record["keys"]["base"] != key or record["identity"]["base"] != name:
                continue
        except (DataError, KeyError, TypeError):
            continue  # tables name it
        if {k: v for k, v in files.items() if k.endswith(WEIGHTS)} != weights:
            raise DataError(
                f"base {name}: its weights in {made['model']} are not those that finished cells "
                f"were trained from ({path}); put the old ones back, name its revision, or remove "
                "those cells"
            )


def _check_finite(name: str, task: str, scores: dict[str, Any]) -> None:
    bad = not_finite(scores, "")
    if bad:
        raise DataError(
            f"base {name}: {bad} of the untouched base on {task} is no finite number; its outputs "
            "overflow"
        )


def _load(folder: Path, precision: str, device: str) -> Any:
    from ballast.models import load_base

    base = load_base(folder, precision, device)
    for name, value in base.model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise DataError(f"{folder}: the weight {name} holds NaN or infinite numbers")
    return base


def _check_gate(
    work: _Work, entries: Entries, precision: str, scores: dict[str, dict[str, Any]]
) -> None:
    gate = work.spec.get("gate")
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
            f"base {work.name} must reach {gate} on every upstream task and reached "
            f"{shown}{_named(precision)}; what a base cannot do cannot be forgotten"
        )
