"""Tokens of an example of a task, before any has been counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ballast.tasks import Task

# Generated worlds, and the readers of real data, in tokens of a common tokenizer.
READERS = {"world": 13.0, "scan": 95.0, "easy_vqa": 20.0, "stories": 250.0, "wikitext": 400.0}
# Tokens of an item where no setting ends it earlier.
LONGEST = 1024
# Question and answer of other data, unless the longest that may stand there is shorter.
USUAL = 200.0
# Answers of a multiple-choice task that lists none itself, and lm-eval's default of a generation.
CHOICES, GENERATED = 4, 256


def example_tokens(
    task: Task, max_length: int | None, positions: int, longest: bool = False
) -> float:
    """Tokens of a usual example, or of the longest there may be; images' own are not counted."""
    most = min(max_length or LONGEST, positions)
    if longest and task.source["reader"] != "world":
        return most
    return min(READERS.get(task.source["reader"], USUAL), most)


def passes(task: Task, sizes: Mapping[str, Any]) -> int:
    """Sequences that are read to score a task's test items: one for every choice of an item."""
    if task.output_type != "multiple_choice":
        return sizes["test"]
    listed = task.config.get("doc_to_choice")
    # Choices of one token share the pass over their prompt where there is an image.
    each = 1 if task.image else len(listed) if isinstance(listed, list) else CHOICES
    return sizes["test"] * each


def generated_tokens(task: Task) -> int:
    """Tokens generated for one item."""
    if not task.generates:
        return 0
    return int(task.config.get("generation_kwargs", {}).get("max_gen_toks", GENERATED))
