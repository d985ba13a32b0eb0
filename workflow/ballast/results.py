"""The results of a suite as tables, statistics, pages and commands read them.

Built from the records and the files beside them, or from a kept suite; nothing here trains.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ballast.keep import read_kept
from ballast.layout import Layout
from ballast.records import scan
from ballast.tables import tidy

Record = dict[str, Any]
# Of an item frame. score: 0 to 1; loss: nats per token of the true answer; form: see `churn.FORMS`;
# base_*: the same of the untouched base.
ITEM_COLUMNS = (
    "cell", "task", "item", "subject", "score", "loss", "form", "base_score", "base_loss",
    "base_form",
)  # fmt: skip
# Of a curve frame, beside score.TASK: kind is trajectory or rewind; share: of the steps, or alpha.
CURVE_COLUMNS = ("cell", "kind", "share", "step", "alpha", "E", "F", "source_mean", "target_mean")


@dataclass(frozen=True)
class Results:
    """Everything that is known of a suite's cells.

    table: one row per cell (`tables.tidy`); records: by cell; items: one row per cell, task and
    item (ITEM_COLUMNS, unknown ones missing); curves: one row per point of a trajectory or a
    rewind (CURVE_COLUMNS); rates: the table of `tune`, or None; folder: where the cells lie, None
    for a kept suite; problems: a line for each file that could not be read.
    """

    suite: str
    table: pd.DataFrame
    records: dict[str, Record]
    items: pd.DataFrame
    curves: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=CURVE_COLUMNS))
    rates: pd.DataFrame | None = None
    folder: Path | None = None
    problems: tuple[str, ...] = ()

    def places(self) -> list[tuple[str, str]]:
        """(base, target) of every table, sorted."""
        planned = self.table[self.table["status"] != "unplanned"]
        return sorted(set(zip(planned["base"], planned["target"], strict=True)))


def read_results(layout: Layout, suite: str, plan: pd.DataFrame | None) -> Results:
    """The results of a suite from its folder; plan: its plan, for what is missing or stale."""
    home = layout.suite(suite)
    records, problems = scan(home / "cells")
    return Results(
        suite=suite,
        table=tidy(records, plan),
        records={record["id"]: record for record in records},
        items=pd.DataFrame(columns=ITEM_COLUMNS),
        folder=home,
        problems=tuple(problems),
    )


def kept_results(folder: Path) -> Results:
    """The results of a kept suite (`snakemake keep`)."""
    records, items = read_kept(folder)
    return Results(
        suite=folder.name,
        table=tidy(records, None),
        records={record["id"]: record for record in records},
        items=items.reindex(columns=ITEM_COLUMNS),
    )
