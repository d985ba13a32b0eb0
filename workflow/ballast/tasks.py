"""Task definitions: lm-eval's YAML, with a `metadata` block that says what the score means."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ballast.errors import SuiteError
from ballast.files import sha256_file

ENCODER_TYPES = ("classification", "masked_token")
UNITS = ("points", "nats", "perplexity")
PATTERNS = ("answer_pattern", "subject_pattern")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
TEXT_READERS = ("stories", "wikitext")  # give plain text


@dataclass(frozen=True)
class Task:
    """A task as its file declares it.

    config: the whole YAML; metric: the module of ballast.metrics that scores it; unit: one of
    `UNITS`, points being 0 to 100 and higher better; chance: the score of guessing, if there is
    one; source: which reader of ballast.sources makes its rows, and from what.
    """

    name: str
    path: Path
    config: dict[str, Any]
    digest: str

    @property
    def metadata(self) -> dict[str, Any]:
        return self.config["metadata"]

    @property
    def metric(self) -> str:
        return self.metadata["metric"]

    @property
    def unit(self) -> str:
        return self.metadata["unit"]

    @property
    def chance(self) -> float | None:
        return self.metadata.get("chance")

    @property
    def source(self) -> dict[str, Any]:
        return self.metadata["source"]

    @property
    def output_type(self) -> str:
        return self.config["output_type"]

    @property
    def rolling(self) -> bool:
        return self.output_type == "loglikelihood_rolling"

    @property
    def generates(self) -> bool:
        return self.output_type == "generate_until"

    @property
    def encoder(self) -> bool:
        """Whether the task is put to an encoder: it names a class, or fills a masked token."""
        return self.output_type in ENCODER_TYPES

    @property
    def classes(self) -> list[str]:
        """Names of the classes of a classification, by index; empty for other tasks."""
        return self.metadata.get("classes", [])

    @property
    def image(self) -> bool:
        return "doc_to_image" in self.config

    @property
    def running(self) -> bool:
        """Whether the items are running text, of which no item is right or wrong as a whole."""
        masked = self.output_type == "masked_token" and self.source["reader"] in TEXT_READERS
        return self.rolling or masked

    @property
    def answer_pattern(self) -> str | None:
        """What the whole of a generated answer looks like, a regular expression; None: unknown."""
        return self.metadata.get("answer_pattern")

    @property
    def subject_pattern(self) -> str | None:
        """Finds the subject of an item in its question: the expression's group, else the match."""
        return self.metadata.get("subject_pattern")


def read_task(path: Path) -> Task:
    """Read one task file. Raises SuiteError if it does not declare metric, unit and source."""
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SuiteError(f"{path.name}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not {"task", "output_type"} <= set(config):
        raise SuiteError(f"{path.name}: a task file with the keys task and output_type is expected")
    if not isinstance(config["task"], str) or not NAME.fullmatch(config["task"]):
        raise SuiteError(
            f"{path.name}: task {config['task']!r:.100}; a name of 1 to 64 letters, digits, '_', "
            "'.' and '-' is expected, a letter or digit first: folders are called by it"
        )
    metadata = config.get("metadata") or {}
    for key in ("metric", "unit", "direction", "source", "title"):
        if key not in metadata:
            raise SuiteError(f"{path.name}: metadata.{key} is missing")
    if metadata["unit"] not in UNITS:
        raise SuiteError(f"{path.name}: metadata.unit {metadata['unit']!r}; allowed: {UNITS}")
    if metadata["unit"] == "points" and metadata["direction"] != "higher":
        raise SuiteError(f"{path.name}: points are 0 to 100 and higher is better")
    for key in PATTERNS:
        _check_pattern(metadata.get(key), f"{path.name}: metadata.{key}")
    classes = metadata.get("classes")
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if config["output_type"] == "classification" and not (named and len(set(classes)) > 1):
        raise SuiteError(
            f"{path.name}: metadata.classes is {classes!r}; the names of two classes or more are "
            "expected, in the order of their indices"
        )
    return Task(config["task"], path, config, sha256_file(path)[:16])


def _check_pattern(pattern: Any, where: str) -> None:
    if pattern is None:
        return
    try:
        groups = re.compile(pattern).groups
    except (TypeError, re.error) as error:
        raise SuiteError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    if where.endswith("subject_pattern") and groups > 1:
        raise SuiteError(f"{where}: {pattern!r} has {groups} groups; at most one is expected")


def read_tasks(folder: Path) -> dict[str, Task]:
    """Every task under `folder` by name. Raises SuiteError if two files share a name."""
    found: dict[str, Task] = {}
    for path in sorted(folder.rglob("*.yaml")):
        task = read_task(path)
        if task.name in found:
            raise SuiteError(f"{path}: task {task.name} is also in {found[task.name].path}")
        found[task.name] = task
    return found
