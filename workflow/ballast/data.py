"""Data of a base: rows rendered, tokenised and stored once, shared by all its cells.

A task's folder holds one `datasets` table per split, features.safetensors per split for images, and
manifest.json, written last: counts, what was dropped, fingerprints, the template's hash, and the
SHA-256 of every file. A folder that does not fit it is set aside, never used.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from safetensors.torch import load_file, save_file
from torch import Tensor

from ballast import sources
from ballast.errors import Damaged, DataError
from ballast.files import (
    read_json,
    read_sealed,
    set_aside,
    sha256_file,
    write_json,
    write_sealed,
    wrong_files,
)
from ballast.models import Base, tower_features
from ballast.tasks import Task
from ballast.template import GAP, Encoding, Template, template_for

MANIFEST, IDENTITIES = "manifest.json", "identities.json"


def identity(row: dict[str, Any]) -> str:
    """The text by which a row is known: question and, for images, what the image shows."""
    text = row.get("text") or row["question"]
    parts = (row.get("identity", ""), text, row.get("pair", ""))
    return " ".join(" ".join(parts).lower().split())


def prepare_task(
    load: Callable[[], Base],
    spec: dict[str, Any],
    task: Task,
    entry: dict[str, Any],
    folder: Path,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Make a task's folder for a base, unless it is there; returns its manifest.

    load: gives the base, called only if there is work; spec: the base's part of the suite; entry:
    the plan's entry (sizes, max_length).
    Raises DataError for overlapping splits of generated data, and for rows of the wrong kind.
    """
    if (folder / MANIFEST).exists():
        try:
            check_data(folder)
            return _told(read_sealed(folder / MANIFEST))
        except Damaged as error:
            report(f"{error}; made again now")
    base = load()
    if task.image and not base.multimodal:
        raise DataError(f"{task.name} shows images, but the base is a text model")
    if task.encoder != (base.anatomy.kind == "encoder"):
        raise DataError(
            f"{task.name} is a task of type {task.output_type}, but the base is "
            + ("no encoder" if task.encoder else "an encoder")
        )
    shutil.rmtree(folder, ignore_errors=True)
    made = {split: _rows(task, split, n) for split, n in entry["sizes"].items()}
    for split, rows in made.items():
        _check_keys(rows, task, split)
        _name_subjects(rows)
    dropped = _separate(made, task)
    manifest: dict[str, Any] = {"task": task.name, "source": task.source, "splits": {}}
    identities = {}
    for split, rows in made.items():
        features, images = _features(base, rows) if task.image else (None, [0] * len(rows))
        if task.encoder:
            encoding = Encoding(base.tokenizer, spec.get("template"))
            table, lost = _encoded(rows, task, encoding, entry["max_length"])
        else:
            tokens = features.shape[1] if features is not None else 0
            template = template_for(base.tokenizer, spec, tokens)
            table, lost = _table(rows, images, split, task, template, entry["max_length"])
        table.save_to_disk(folder / split)
        if features is not None:
            save_file({"features": features.contiguous()}, folder / f"{split}.safetensors")
        identities[split] = [identity(row) for row in rows]
        manifest["splits"][split] = {
            "rows": len(table),
            "too_long": lost,
            "overlapping": dropped.get(split, 0),
            "fingerprint": table._fingerprint,
            "text_sha256": _digest(identities[split]),
        }
        report(f"{task.name} {split}: {len(table)} rows" + (f", {lost} too long" if lost else ""))
        if task.encoder:
            manifest["template"] = encoding.digest()
        else:
            manifest["template"] = None if task.rolling else template.digest()
    write_json(folder / IDENTITIES, identities)
    write_manifest(folder, manifest)
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a folder's manifest with the hashes of all files that are there by now."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
    write_sealed(folder / MANIFEST, manifest | {"files": files})


def _told(manifest: dict[str, Any]) -> dict[str, Any]:
    """What records say of data: all but the files' hashes."""
    return {key: value for key, value in manifest.items() if key != "files"}


def check_data(folder: Path, split: str | None = None) -> None:
    """Raise Damaged if a prepared folder, or a split of it, is not as it was made.

    The folder is then set aside, so that the next run makes it again. Files are read once in a
    process, unless they change. Folders of earlier versions have no hashes: their tables must have
    the rows and the fingerprint, and their texts the hash, that the manifest says.
    """
    try:
        _check_data(folder, split, _stamp(folder))
    except Damaged as error:
        set_aside(folder)
        raise Damaged(
            f"{error}; {folder} is set aside as *.damaged, and made again by the next run"
        ) from None


def _stamp(folder: Path) -> tuple[Any, ...]:
    """Sizes and times of a folder's files. Raises Damaged if there is no such folder."""
    if not folder.is_dir():
        raise Damaged(f"{folder}: missing")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths)


@functools.cache
def _check_data(folder: Path, split: str | None, _: tuple[Any, ...]) -> None:
    if not (folder / MANIFEST).is_file():
        raise Damaged(f"{folder / MANIFEST}: missing")
    manifest = read_sealed(folder / MANIFEST)
    files = manifest.get("files")
    if files is None:
        return _check_old(folder, manifest)
    chosen = {
        name: digest
        for name, digest in files.items()
        if split is None or name.startswith((f"{split}/", f"{split}."))
    }
    for name, problem in wrong_files(folder, chosen).items():
        raise Damaged(f"{folder / name}: {problem}")


def _check_old(folder: Path, manifest: dict[str, Any]) -> None:
    try:
        identities = read_json(folder / IDENTITIES)
        for split, about in manifest["splits"].items():
            table = datasets.load_from_disk(str(folder / split))
            fits = (len(table), table._fingerprint) == (about["rows"], about["fingerprint"])
            if not fits or _digest(identities[split]) != about["text_sha256"]:
                raise Damaged(f"{folder / split}: not the data that the manifest describes")
    except (FileNotFoundError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        text = " ".join(str(error).split())[:200]
        raise Damaged(f"{folder}: damaged: {text}") from None


def _rows(task: Task, split: str, count: int | None) -> list[sources.Row]:
    try:
        return sources.rows(task.source, split, count)
    except DataError as error:
        raise DataError(f"{task.name} {split}: {error}") from None


def _check_keys(rows: list[sources.Row], task: Task, split: str) -> None:
    """Refuse rows that lack what a task of this kind scores."""
    if task.encoder:
        return _check_encoder_keys(rows, task, split)
    needed = ("text",) if task.rolling else ("question", "response")
    if task.output_type == "multiple_choice":
        needed += ("choices", "answer")
    if task.image:
        needed += ("image",)
    for number, row in enumerate(rows, 1):
        for key in needed:
            if key not in row:
                raise DataError(f"{task.name} {split}, row {number}: no {key} in {sorted(row)}")
        if task.image and not hasattr(row["image"], "convert"):
            raise DataError(
                f"{task.name} {split}, row {number}: image is {row['image']!r:.120}; a picture is "
                "expected"
            )


def _check_encoder_keys(rows: list[sources.Row], task: Task, split: str) -> None:
    """Refuse rows without a class that the task has, or whose gaps and words are not as many."""
    for number, row in enumerate(rows, 1):
        where = f"{task.name} {split}, row {number}"
        if task.output_type == "masked_token":
            sentences = f"{row.get('question', '')} {row.get('pair', '')}"
            gaps, words = sentences.count(GAP), len(str(row.get("response", "")).split())
            if "text" not in row and not gaps == words > 0:
                raise DataError(f"{where}: {gaps} times {GAP} for {words} words of the response")
        elif "question" not in row or class_of(row, task) is None:
            raise DataError(
                f"{where}: answer {row.get('answer')!r}, response {row.get('response')!r}; a "
                f"question and one of the classes {', '.join(task.classes)} are needed"
            )


def class_of(row: sources.Row, task: Task) -> int | None:
    """Index of a row's class, by its response's name or else its answer; None if it has none."""
    if "response" in row:
        return task.classes.index(row["response"]) if row["response"] in task.classes else None
    answer = row.get("answer")
    return answer if type(answer) is int and 0 <= answer < len(task.classes) else None


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _separate(made: dict[str, list[sources.Row]], task: Task) -> dict[str, int]:
    """Take rows out of training (and validation) whose text is also in validation or test.

    Generated data are disjoint by construction, so an overlap there is an error; in data of others
    it is dropped from the training side and counted.
    """
    dropped: dict[str, int] = {}
    seen: set[str] = set()
    for split in ("test", "validation", "train"):
        if split not in made:
            continue
        kept = [row for row in made[split] if identity(row) not in seen]
        lost = len(made[split]) - len(kept)
        if lost and task.source["reader"] == "world":
            odd = next(identity(r) for r in made[split] if identity(r) in seen)
            raise DataError(f"{task.name}: {lost} rows of {split} stand in another split: {odd!r}")
        dropped[split], made[split] = lost, kept
        seen |= {identity(row) for row in kept}
    return dropped


def _features(base: Base, rows: list[sources.Row]) -> tuple[Tensor, list[int]]:
    """Tower features of the rows' distinct images, and each row's place in them."""
    keys: dict[bytes, int] = {}
    distinct, places = [], []
    for row in rows:
        image = row["image"]
        key = hashlib.sha256(image.tobytes()).digest()
        if key not in keys:
            keys[key] = len(distinct)
            distinct.append(image)
        places.append(keys[key])
    return tower_features(base, distinct), places


def _table(
    rows: list[sources.Row],
    images: list[int],
    split: str,
    task: Task,
    template: Template,
    max_length: int | None,
) -> tuple[datasets.Dataset, int]:
    """A split as a table: training rows tokenised, evaluation rows rendered."""
    if task.rolling:
        return datasets.Dataset.from_list([{"text": r["text"]} | _subject(r) for r in rows]), 0
    records, lost = [], 0
    for row, image in zip(rows, images, strict=True):
        prompt = template.prompt(row["question"], task.image)
        tokens, start = template.example(prompt, row["response"])
        if max_length and len(tokens) > max_length:
            lost += 1
            continue
        record: dict[str, Any] = {"image": image}
        if split == "train":
            record |= {"input_ids": tokens, "prompt_length": start}
        else:
            record |= {k: row[k] for k in ("question", "response") if k in row}
            record |= _subject(row)
            record["prompt"] = prompt
            if task.output_type == "multiple_choice":
                record |= {"choices": row["choices"], "answer": row["answer"]}
        records.append(record)
    if not records:
        raise DataError(f"{task.name} {split}: every row is longer than {max_length} tokens")
    return datasets.Dataset.from_list(records), lost


def _name_subjects(rows: list[sources.Row]) -> None:
    """Give every row a subject, "" where it has none, if any of them has one."""
    if any(row.get("subject") is not None for row in rows):
        for row in rows:
            row["subject"] = "" if row.get("subject") is None else str(row["subject"])


def _subject(row: sources.Row) -> dict[str, str]:
    return {"subject": row["subject"]} if "subject" in row else {}


def _encoded(
    rows: list[sources.Row], task: Task, encoding: Encoding, max_length: int | None
) -> tuple[datasets.Dataset, int]:
    """A split for an encoder, the same form for training and evaluation.

    Rows longer than max_length, or than the encoder reads, are dropped and counted.
    """
    longest = min(max_length or encoding.longest, encoding.longest)
    records, lost = [], 0
    for row in rows:
        if task.output_type == "masked_token":
            record = encoding.masked(row)
        else:
            record = encoding.example(row) | {"label": class_of(row, task)}
            record["prompt_length"] = len(record["input_ids"])  # no token carries loss
        if len(record["input_ids"]) > longest:
            lost += 1
        else:
            records.append(record | _subject(row))
    if not records:
        raise DataError(f"{task.name}: no row has at most {longest} tokens")
    return datasets.Dataset.from_list(records), lost


def check_overlaps(folders: dict[str, Path], targets: list[str]) -> None:
    """Refuse targets whose training text is an item of another task of the same base.

    folders: task folders by task. Raises DataError that names the tasks and an item.
    """
    texts = {name: read_json(folder / IDENTITIES) for name, folder in folders.items()}
    for target in targets:
        train = set(texts[target].get("train", []))
        for name, splits in texts.items():
            if name == target:
                continue
            shared = train & set(splits["test"])
            if shared:
                raise DataError(
                    f"{len(shared)} training items of {target} are test items of {name}, such as "
                    f"{min(shared)!r}: what is trained cannot measure what is retained; "
                    "take one of the two out of the suite"
                )


def load_split(folder: Path, split: str) -> tuple[datasets.Dataset, Tensor | None]:
    """A prepared split, and its image features if it has images.

    Raises DataError if its files are missing or damaged (`check_data`).
    """
    check_data(folder, split)
    table = datasets.load_from_disk(str(folder / split))
    path = folder / f"{split}.safetensors"
    return table, load_file(path)["features"] if path.exists() else None
