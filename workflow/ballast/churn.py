"""What became of every item: kept, gained, forgotten or never known, against the untouched base.

An item is right from a score of one half. Two losses that are no loss of knowledge are told apart:
one of form (no answer can be extracted any more), and one of generation alone (the true answer is
still likely, but the model does not say it).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ballast.tasks import Task

# Whether an answer could be extracted; an item's `form` is the index.
FORMS = ("answer", "other", "empty")
ANSWER, OTHER, EMPTY = range(len(FORMS))
RIGHT = 0.5  # the score from which an item counts as right
LIKELY = math.log(2)  # nats per token: a probability of one half
CLOSED = 100  # the most distinct answers of a task whose answers are a closed set
MOST_SUBJECTS = 200  # more are no subjects but a column of another kind
MOST_CHANGES, LONGEST = 10, 500  # entries per list, characters per text


def forms(task: Task, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
    """The form of each prediction, int8 codes of FORMS.

    A task that does not generate always has an answer. Generated text is empty if blank; it is an
    answer if all of it matches the task's `answer_pattern` (ignoring case) or, without one, if it
    is among the references where these are a closed set (each twice on average, at most 100 of
    them), else whatever it says.
    """
    if not task.generates:
        return np.zeros(len(predictions), dtype=np.int8)
    texts = [_plain(text) for text in predictions]
    is_answer = _answers(task.answer_pattern, [_plain(text) for text in references])
    return np.array(
        [EMPTY if not text else ANSWER if is_answer(text) else OTHER for text in texts],
        dtype=np.int8,
    )


def _plain(text: Any) -> str:
    return " ".join(str(text).split())


def _answers(pattern: str | None, references: list[str]) -> Callable[[str], bool]:
    """Whether a text that is not blank is an answer."""
    if pattern is not None:
        whole = re.compile(pattern, re.IGNORECASE)
        return lambda text: whole.fullmatch(text) is not None
    known = {text.casefold() for text in references}
    if len(known) <= min(CLOSED, len(references) / 2):
        return lambda text: text.casefold() in known
    return lambda text: True


def churn_of(items: pd.DataFrame) -> dict[str, Any]:
    """Counts of a task's items, as `churn` of a record has them.

    items: columns score and base_score (0 to 1), loss (nats per token of the true answer), form,
    and subject ("" where the row has none).
    """
    counts: dict[str, Any] = _counts(items)
    named = items[items["subject"].astype(str) != ""]
    if 0 < named["subject"].nunique() <= MOST_SUBJECTS:
        groups = named.groupby(named["subject"].astype(str), sort=True)
        counts["subjects"] = {subject: _counts(part) for subject, part in groups}
    return counts


def _counts(items: pd.DataFrame) -> dict[str, int]:
    before, after = (items[c].to_numpy() >= RIGHT for c in ("base_score", "score"))
    forgotten = before & ~after
    found = {
        "n": before | True,
        "kept": before & after,
        "gained": ~before & after,
        "forgotten": forgotten,
        "never": ~before & ~after,
        "forgotten_form": forgotten & (items["form"].to_numpy() != ANSWER),
        "forgotten_likely": forgotten & (items["loss"].to_numpy() <= LIKELY),
    }
    return {name: int(chosen.sum()) for name, chosen in found.items()}


def changes_of(
    items: pd.DataFrame, texts: Callable[[int], dict[str, str]], most: int = MOST_CHANGES
) -> dict[str, list[dict[str, Any]]]:
    """The first `most` gained and forgotten items of a task, by item.

    texts: question, reference, before and after of an item; long ones are cut.
    """
    ordered = items.sort_values("item")
    before, after = (ordered[c].to_numpy() >= RIGHT for c in ("base_score", "score"))
    changed = {"gained": ~before & after, "forgotten": before & ~after}
    return {
        name: [
            {"item": int(item)} | {key: cut(text) for key, text in texts(int(item)).items()}
            for item in ordered.loc[chosen, "item"].head(most)
        ]
        for name, chosen in changed.items()
    }


def cut(text: str, longest: int = LONGEST) -> str:
    """The text, its end replaced by an ellipsis where it is longer than `longest` characters."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
