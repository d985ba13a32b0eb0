"""The results of a suite as tables, statistics, pages and commands read them.

Built from the records and the files beside them, or from a kept suite; nothing here trains.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ballast.community import read_community, revisions
from ballast.curves import CURVE_COLUMNS, read_curves
from ballast.errors import Damaged, DataError
from ballast.files import check_sums
from ballast.items import CHANGES, items_of
from ballast.items import COLUMNS as ITEM_COLUMNS
from ballast.keep import read_kept, read_kept_curves
from ballast.layout import Layout
from ballast.rates import TABLE, read_rates
from ballast.records import beside, scan
from ballast.tables import tidy

Record = dict[str, Any]
BESIDE = (CHANGES, "curve.csv")  # what pages show of a cell


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


def read_results(
    layout: Layout, suite: str, plan: pd.DataFrame | None, rates: Path | None = None
) -> Results:
    """The results of a suite from its folder, those merged from other machines beside its own.

    plan: the suite's plan, for what is missing or stale; rates: the table of learning rates that
    the suite names, where `tune` has made no newer one.
    """
    home = layout.suite(suite)
    records, problems = scan(home / "cells")
    others, other_items = read_community(home, problems)
    table = tidy([*records, *others], plan)
    for cell, label in revisions(records, others).items():
        table.loc[table["id"] == cell, ["status", "reason"]] = ["unplanned", label]
    items = items_of(home / "cells", records)
    curves = read_curves(home, records)
    problems += items.attrs["problems"] + curves.attrs["problems"]
    problems += _wrong_beside(home / "cells", records)
    return Results(
        suite=suite,
        table=table,
        records={record["id"]: record for record in [*records, *others]},
        items=_joined(items, other_items),
        curves=curves,
        rates=_rates(home / "tune", rates, problems),
        folder=home,
        problems=tuple(problems),
    )


def kept_results(folder: Path) -> Results:
    """The results of a kept suite (`snakemake keep`)."""
    records, items = read_kept(folder)
    curves = read_kept_curves(folder)
    rest = {} if curves is None else {"curves": curves}
    return Results(
        suite=folder.name,
        table=tidy(records, None),
        records={record["id"]: record for record in records},
        items=items.reindex(columns=ITEM_COLUMNS),
        rates=_rates(folder),
        **rest,
    )


def _joined(own: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Items of both, with ITEM_COLUMNS; names stay categories, as there are millions of items."""
    own = own.reindex(columns=ITEM_COLUMNS)
    if others.empty:
        return own
    whole = pd.concat([own, others.reindex(columns=ITEM_COLUMNS)], ignore_index=True)
    return whole.astype(dict.fromkeys(("cell", "task", "subject"), "category"))


def _wrong_beside(cells: Path, records: list[Record]) -> list[str]:
    """A line for each file that a page shows of a cell and that is damaged or gone."""
    found = []
    for record in records:
        for name in BESIDE:
            try:
                beside(cells / record["id"], record, name)
            except DataError as error:
                found.append(f"{error}; the cell's page goes without it")
    return found


def _rates(
    folder: Path, other: Path | None = None, problems: list[str] | None = None
) -> pd.DataFrame | None:
    """The table of learning rates of a folder, or else `other`; None if there is neither.

    problems: takes a line for a damaged one, which is left out; without it, Damaged is raised.
    """
    try:
        if (folder / TABLE).is_file():
            check_sums(folder)
            return read_rates(folder / TABLE)
    except Damaged as error:
        if problems is None:
            raise
        problems.append(str(error))
    return read_rates(other) if other and other.is_file() else None
