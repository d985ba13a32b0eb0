"""Published and own results of one protocol side by side, on whatever part was run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ballast.published.agreement import Agreement, agreement
from ballast.published.data import check_protocol, protocols, read_published
from ballast.published.matching import match, plain_name
from ballast.published.notes import notes_of
from ballast.statistics.analysis import Analysis

KEY = ["method", "variant", "rank"]
COMPARED = ("target", "upstream", "both")
# A paper's summary is put beside ours of the same kind; in the order of methods Target is as E,
# Source as F and Avg as O, because the base's own scores are the same in every row.
OURS = {"target": "target_mean", "upstream": "source_mean", "both": "Avg"}
TESTED = {"target_mean": "E", "source_mean": "F", "Avg": "O"}
NAMES = {"target_mean": "Target", "source_mean": "Source", "Avg": "Avg"}
SUMMARIES = ("mean", "harmonic_mean", "weighted_mean")
TABLE_COLUMNS = (
    "quantity", "our_quantity", "method", "label", "variant", "our_variant", "rank", "our_rank",
    "published", "spread", "ours", "sd", "seeds", "difference", "differs_in", "place",
    "our_place", "our_place_low", "our_place_high", "same_order",
)  # fmt: skip
Facts = Mapping[str, Mapping[str, Any]]  # of our tasks, by name: role and unit


@dataclass(frozen=True)
class SideBySide:
    """One block of a paper's table (a source, model and target) beside one base and target of ours.

    table: one row per quantity and matched row (TABLE_COLUMNS). published and ours are in the
    quantity's own units; difference (ours - published) is missing where `differs_in` names what is
    not the same (model, target, task, unit, rank, variant). place and our_place: 1 is best among
    the matched rows, ties share the lower place; our_place_low and _high: places that the row may
    hold within our noise (missing without an analysis). same_order: yes, no, or within noise.
    agreements: Kendall's tau of the two orders, by quantity. notes: sentences, plain text.
    """

    protocol: str
    title: str
    base: str
    target: str
    source: str
    model: str
    trained_on: str
    table: pd.DataFrame
    agreements: dict[str, Agreement]
    notes: tuple[str, ...]


def side_by_side(
    ours: Analysis | pd.DataFrame,
    protocol: str,
    base: str = "",
    target: str = "",
    tasks: Facts | None = None,
    published: pd.DataFrame | None = None,
) -> list[SideBySide]:
    """The blocks of a protocol beside our rows, those without a matched method left out.

    ours: an analysis (then base and target may be left out), or rows as `rows_of` gives them.
    tasks: role and unit of our tasks. Blocks of our own base's model are preferred, and of those
    the ones of our target; if there is none, all are compared, in their order only.
    """
    pairs = None
    if isinstance(ours, Analysis):
        base, target, pairs = ours.base, ours.target, ours.pairs
        ours = ours.rows
    check_protocol(protocol)
    about = protocols()[protocol]
    rows = read_published() if published is None else published
    rows = rows[
        (rows["protocol"] == protocol)
        & (rows["tuned"] == "yes")
        & rows["role"].isin(COMPARED)
        & rows["value"].notna()
        & (rows["method"] != "")
        & (rows["unit"] != "mixed")  # CIDEr is never averaged with accuracies
    ]
    found = []
    for where, block in _chosen(rows, base, target):
        item = _Block(where, block, ours, pairs, base, target, tasks or {}, about)
        table = item.table()
        if len(table):
            found.append(item.result(protocol, table))
    return found


def _chosen(rows: pd.DataFrame, base: str, target: str) -> list[tuple[tuple, pd.DataFrame]]:
    for name, own in (("model", base), ("target", target)):
        same = rows[name].map(plain_name) == plain_name(own)
        rows = rows[same] if own and same.any() else rows
    return list(rows.groupby(["source", "model", "target"], sort=False))


class _Block:
    """A block of published rows and ours, while their table is made."""

    def __init__(
        self,
        where: tuple[str, str, str],
        block: pd.DataFrame,
        ours: pd.DataFrame,
        pairs: pd.DataFrame | None,
        base: str,
        target: str,
        tasks: Facts,
        about: Mapping[str, Any],
    ) -> None:
        self.source, self.model, self.trained_on = where
        self.block, self.ours, self.pairs, self.tasks = block, ours, pairs, tasks
        self.base, self.target, self.about = base, target, about

    def table(self) -> pd.DataFrame:
        groups = self.block.groupby(["role", "task", "metric", "unit", "better"], sort=False)
        parts = []
        for (role, task, metric, unit, better), rows in groups:
            name = self._our_quantity(role, task, metric)
            if name is not None and name in self.ours:
                parts.append(self._part(rows, (role, task, metric, unit), better, name))
        parts = [part for part in parts if len(part)]
        empty = pd.DataFrame(columns=list(TABLE_COLUMNS))
        return pd.concat(parts, ignore_index=True)[list(TABLE_COLUMNS)] if parts else empty

    def _our_quantity(self, role: str, task: str, metric: str) -> str | None:
        """Our score of the same task; else our summary beside the paper's, or beside each of its
        tasks where it has no summary of that role."""
        for name in self.tasks:
            if plain_name(name) == plain_name(task):
                return f"score.{name}"
        of_role = self.block[self.block["role"] == role]
        summarised = of_role["metric"].isin(SUMMARIES).any()
        return OURS[role] if metric in SUMMARIES or not summarised else None

    def _part(
        self, rows: pd.DataFrame, what: tuple[str, str, str, str], better: str, name: str
    ) -> pd.DataFrame:
        wanted = [*KEY, "n_ok", name, f"{name}.sd"]
        mine = self.ours[[key for key in wanted if key in self.ours]]
        mine = mine[mine[name].notna()]
        matched = match(rows, mine, self.about.get("variant", ""))
        theirs = rows.loc[[a for a, _ in matched]].reset_index(drop=True)
        own = mine.loc[[b for _, b in matched]].reset_index(names="key")
        part = pd.DataFrame(
            {
                "quantity": f"{what[0].capitalize()}: {what[1]}, {what[3] or 'unit not known'}",
                "our_quantity": NAMES.get(name, name.removeprefix("score.")),
                "method": theirs["method"],
                "label": theirs["label"],
                "variant": theirs["variant"],
                "our_variant": own["variant"],
                "rank": theirs["rank"],
                "our_rank": own["rank"].astype("Int64"),
                "published": theirs["value"],
                "spread": theirs["spread"],
                "ours": own[name].astype("float64"),
                "sd": own[f"{name}.sd"].astype("float64") if f"{name}.sd" in own else float("nan"),
                "seeds": own["n_ok"].astype("Int64"),
            }
        )
        common = self._common_differences(what, name)
        part["differs_in"] = [_differs(common, row) for row in part.to_dict("records")]
        part["difference"] = (part["ours"] - part["published"]).where(part["differs_in"] == "")
        return self._ordered(part, better, list(own["key"]), TESTED.get(name))

    def _common_differences(self, what: tuple[str, str, str, str], name: str) -> list[str]:
        role, task, metric, unit = what
        found = [] if plain_name(self.model) == plain_name(self.base) else ["model"]
        trained = {plain_name(self.trained_on), plain_name(task)} - {""}
        if plain_name(self.target) not in trained and not self._covers("target", trained):
            found.append("target")
        if name in NAMES and not (metric == "mean" and self._same_tasks(role)):
            found.append("task")
        own = self.tasks.get(name.removeprefix("score."), {}).get("unit", "points")
        return found + (["unit"] if unit != own else [])

    def _same_tasks(self, role: str) -> bool:
        """Whether the paper's tasks behind a summary are those that ours is the mean of."""
        roles = ("target", "upstream") if role == "both" else (role,)
        return all(self._covers(one) for one in roles)

    def _covers(self, role: str, names: set[str] | None = None) -> bool:
        """Whether our tasks of a role are those named, or the paper's of that role."""
        if names is None:
            of_role = self.block[
                (self.block["role"] == role) & ~self.block["metric"].isin(SUMMARIES)
            ]
            names = set(of_role["task"].map(plain_name))
        own = {plain_name(k) for k, facts in self.tasks.items() if facts.get("role") == role}
        return bool(own) and own == names

    def _ordered(
        self, part: pd.DataFrame, better: str, keys: list[object], tested: str | None
    ) -> pd.DataFrame:
        part["place"] = part["published"].rank(method="min", ascending=better == "lower")
        part["our_place"] = part["ours"].rank(method="min", ascending=False)
        low, high = self._places(keys, tested)
        part["our_place_low"], part["our_place_high"] = low, high
        for name in ("place", "our_place", "our_place_low", "our_place_high"):
            part[name] = part[name].astype("Int64")
        same = part["place"] == part["our_place"]
        within = (part["place"] >= part["our_place_low"]) & (
            part["place"] <= part["our_place_high"]
        )
        part["same_order"] = "no"
        part.loc[within.fillna(False), "same_order"] = "within noise"
        part.loc[same, "same_order"] = "yes"
        return part.sort_values(["place", "our_place", "label"], kind="stable", ignore_index=True)

    def _places(self, keys: list[object], tested: str | None) -> tuple[list, list]:
        """Places among the matched rows that each may hold, by the analysis's corrected tests."""
        if self.pairs is None or tested is None:
            return [None] * len(keys), [None] * len(keys)
        pairs = self.pairs[
            (self.pairs["quantity"] == tested)
            & self.pairs["a"].isin(keys)
            & self.pairs["b"].isin(keys)
            & (self.pairs["p_adjusted"] < 0.05)
        ]
        up, down = pairs[pairs["difference"] > 0], pairs[pairs["difference"] < 0]
        above = pd.concat([up["b"], down["a"]]).value_counts()
        below = pd.concat([up["a"], down["b"]]).value_counts()
        low = [1 + int(above.get(key, 0)) for key in keys]
        high = [len(keys) - int(below.get(key, 0)) for key in keys]
        return low, high

    def result(self, protocol: str, table: pd.DataFrame) -> SideBySide:
        agreements = {}
        for name, part in table.groupby("quantity", sort=False):
            agreements[str(name)] = agreement(-part["place"].astype(float), part["ours"])
        notes = [
            f"Published: {self.source}, {self.model or 'model not known'}, "
            f"{self.trained_on or 'target not known'}. Ours: {self.base} tuned on {self.target}."
        ]
        notes += notes_of(table, agreements, self.block, set(self.ours["method"]), self.about)
        return SideBySide(
            protocol, str(self.about.get("title", protocol)), self.base, self.target, self.source,
            self.model, self.trained_on, table, agreements, tuple(notes),
        )  # fmt: skip


def _differs(common: list[str], row: Mapping[str, Any]) -> str:
    words = list(common)
    for name, own in (("rank", "our_rank"), ("variant", "our_variant")):
        first, second = row[name], row[own]
        both_missing = pd.isna(first) and pd.isna(second)
        if not both_missing and (pd.isna(first) or pd.isna(second) or first != second):
            words.append(name)
    return ", ".join(words)
