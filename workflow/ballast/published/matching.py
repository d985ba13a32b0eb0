"""Which published row stands beside which of ours: by method, variant and rank."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pandas as pd

_BARE = r"(of-[^-+]+)?"
Entry = tuple[object, float | None]  # a row's label and its rank


def plain_name(text: str) -> str:
    """Letters and digits of a name, lower case: LLaMA2-7B and llama-2-7b are one model."""
    return "".join(c for c in str(text).casefold() if c.isalnum())


def match(
    published: pd.DataFrame, ours: pd.DataFrame, main: str = ""
) -> list[tuple[object, object]]:
    """Pairs of index labels (published, ours); no row of either side stands in two pairs.

    Both frames have method, variant and rank (missing: none, or not known). A method's rows of the
    same variant are paired rank by rank; where no rank is common, the two nearest (by ratio) are.
    What is left of ours without a variant (a post-hoc method's `of-PARENT` counts as none) is then
    paired with the paper's rows without one, or if there are none, with those of `main`, or of any.
    """
    theirs = published[published["method"] != ""]
    pairs = _paired(theirs, ours)
    left = theirs.drop(index=[a for a, _ in pairs])
    mine = ours.drop(index=[b for _, b in pairs])
    done = ours.loc[[b for _, b in pairs]]
    done = done.loc[done["variant"] == "", "method"]
    mine = mine[mine["variant"].str.fullmatch(_BARE) & ~mine["method"].isin(done)]
    left = left[left["method"].isin(mine["method"])]
    for variant in ("", main):
        named = set(theirs.loc[theirs["variant"] == variant, "method"])
        left = left[(left["variant"] == variant) | ~left["method"].isin(named)]
    return pairs + _paired(left.assign(variant=""), mine.assign(variant=""))


def _paired(theirs: pd.DataFrame, mine: pd.DataFrame) -> list[tuple[object, object]]:
    groups = dict(list(mine.groupby(["method", "variant"], sort=False)))
    found = []
    for key, block in theirs.groupby(["method", "variant"], sort=False):
        if key in groups:
            found += _by_rank(_entries(block), _entries(groups[key]))
    return found


def _entries(block: pd.DataFrame) -> list[Entry]:
    """Label and rank of each row, the first of every rank only."""
    seen: dict[float | None, object] = {}
    for label, rank in zip(block.index, block["rank"], strict=True):
        seen.setdefault(None if pd.isna(rank) else float(rank), label)
    return [(label, rank) for rank, label in seen.items()]


def _by_rank(theirs: Iterable[Entry], mine: Iterable[Entry]) -> list[tuple[object, object]]:
    by_rank = {rank: label for label, rank in mine}
    common = [(label, by_rank[rank]) for label, rank in theirs if rank in by_rank]
    if common:
        return common
    choices = [(_ratio(p, q), q or 0, p or 0, a, b) for a, p in theirs for b, q in mine]
    nearest = min(choices, key=lambda choice: choice[:3])
    return [(nearest[3], nearest[4])]


def _ratio(first: float | None, second: float | None) -> float:
    return abs(math.log2(first / second)) if first and second else math.inf
