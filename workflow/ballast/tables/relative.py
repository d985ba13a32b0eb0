"""Costs and scores beside those of the control that the same machine ran."""

from __future__ import annotations

import pandas as pd

from ballast.community.control import normalised
from ballast.statistics.rows import row_keys
from ballast.tables.printed import Cell, Column, Table, absent, number
from ballast.tables.summary import Place, Row, by_row

SHOWN = {
    "relative.seconds.train": "Training",
    "relative.step_ms": "Step",
    "relative.memory_mb.train": "Memory",
}


def relative_table(place: Place) -> Table | None:
    """Every row relative to the control run on its own hardware; None where no row has one.

    So that rows of other machines, whose seconds say nothing here, can stand beside ours.
    """
    if place.analysis.control is None:
        return None
    method = str(place.analysis.rows.loc[place.analysis.control, "method"])
    found = normalised(place.cells, place.results.records, method)
    if found["control"].isna().all():
        return None
    means = found.drop(columns=["control", "control_n"]).groupby(row_keys(place.cells)).mean()
    known = means.to_dict("index")

    def line(row: Row) -> list[Cell]:
        own = known.get(row["key"], {})
        costs = [Cell(number(own.get(name), 2)) for name in SHOWN]
        return costs + [Cell(number(own.get(f"to_control.{q}"), 2, signed=True)) for q in "EF"]

    columns = [Column(title, "Cost, control = 1") for title in SHOWN.values()]
    columns += [Column(name, "Difference, points") for name in "EF"]
    raw = pd.DataFrame(means).rename_axis("row").reset_index()
    return by_row(
        place, columns, line, name="relative", title="Beside the control on the same hardware",
        about="Means over seeds; the control of a row has the nearest rank and was run by the same "
        "origin on the same hardware, from the same base and data.", raw=raw,
        notes=_origins(place),
    )  # fmt: skip


def _origins(place: Place) -> tuple[str, ...]:
    elsewhere = sorted({row["origin"] for row in place.rows.values() if not absent(row["origin"])})
    names = [name for name in elsewhere if name]
    if not names:
        return ()
    return (f"Rows with @NAME were made elsewhere and merged: {', '.join(names)}.",)
