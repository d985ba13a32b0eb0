"""Costs beside those of a control that the same machine ran, so that machines can be compared.

Seconds of one machine say little about another; that DoRA takes 1.3 times as long as LoRA on the
same hardware may hold on both. A control is a row of the same base and target, made by the same
origin on the same hardware from the same base and data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from ballast.statistics.rows import row_keys

Record = Mapping[str, Any]
RATIOS = ("seconds.train", "memory_mb.train", "step_ms")
DIFFERENCES = ("E", "F")
HARDWARE = ("device", "processor", "threads")
# What must be the same of two cells before one may be measured by the other.
SAME = ("origin", "base", "target", "machine", "base_key", "data_key")


def normalised(
    table: pd.DataFrame, records: Mapping[str, Record], control: str = "lora"
) -> pd.DataFrame:
    """Every cell's costs and scores relative to its control's mean; the index of `table`.

    control: a row's key, or a method: its row without variant of the cell's own rank, or else of
    the rank nearest to it. Columns: `control` (the row's key), `control_n` (its cells),
    `relative.Q` for Q of RATIOS (a quotient; 1: as much as the control), `to_control.Q` for Q of
    DIFFERENCES (points). Only cells that are ok count; what has no control is missing.
    """
    cells = _cells(table, records)
    controls = _controls(cells, control)
    chosen = _nearest(cells, controls)
    found = pd.DataFrame(index=table.index)
    known = controls.reindex(chosen)
    found["control"] = known["key"].to_numpy(dtype=object)
    found["control_n"] = pd.array(known["n"], dtype="Int64")
    good = (table["status"] == "ok").to_numpy(bool)
    for name in RATIOS:
        mean = known[name].to_numpy(dtype=float)
        quotient = cells[name].to_numpy() / np.where(mean > 0, mean, np.nan)
        found[f"relative.{name}"] = np.where(good, quotient, np.nan)
    for name in DIFFERENCES:
        difference = cells[name].to_numpy() - known[name].to_numpy(dtype=float)
        found[f"to_control.{name}"] = np.where(good, difference, np.nan)
    return found


def _cells(table: pd.DataFrame, records: Mapping[str, Record]) -> pd.DataFrame:
    """What decides on a control, one row per cell; machine is missing where nothing is known."""
    facts = [_facts(records.get(cell)) for cell in table["id"]]
    cells = pd.DataFrame(facts, index=table.index, columns=["machine", "base_key", "data_key"])
    for name in ("base", "target", "method"):
        cells[name] = table[name].astype(object)
    for name in ("origin", "variant"):
        cells[name] = table[name].astype(object).fillna("")
    cells["key"] = row_keys(table)
    cells["rank"] = table["rank"].to_numpy(dtype=float, na_value=np.nan)
    cells["ok"] = (table["status"] == "ok").to_numpy(bool)
    for name in (*RATIOS, *DIFFERENCES):
        cells[name] = table[name].to_numpy(dtype=float, na_value=np.nan)
    return cells


def _facts(record: Record | None) -> tuple[str | None, str | None, str | None]:
    if record is None:
        return None, None, None
    machine = tuple(str(record["provenance"].get(name)) for name in HARDWARE)
    known = record["provenance"].get("device") is not None
    return " | ".join(machine) if known else None, record["keys"]["base"], record["keys"]["data"]


def _controls(cells: pd.DataFrame, control: str) -> pd.DataFrame:
    """Means of the rows that may be controls, one line for each place they are of."""
    plain = (cells["method"] == control) & (cells["variant"] == "")
    chosen = cells[cells["ok"] & cells["machine"].notna() & ((cells["key"] == control) | plain)]
    groups = chosen.groupby([*SAME, "key"], sort=True)
    means = groups[["rank", *RATIOS, *DIFFERENCES]].mean()
    return means.assign(n=groups.size()).reset_index()


def _nearest(cells: pd.DataFrame, controls: pd.DataFrame) -> np.ndarray:
    """For each cell the position of its control in `controls`, or -1."""
    places = cells[list(SAME)].assign(cell=np.arange(len(cells)), own=cells["rank"].to_numpy())
    known = controls[[*SAME, "rank"]].assign(at=np.arange(len(controls)))
    pairs = places[cells["machine"].notna().to_numpy()].merge(known, on=list(SAME))
    # Ranks are doubled and halved, so they are near to each other as logarithms.
    gap = (np.log(pairs["own"]) - np.log(pairs["rank"])).abs()
    pairs = pairs.assign(gap=gap.fillna(0.0)).sort_values(["cell", "gap", "rank"], kind="stable")
    first = pairs.drop_duplicates("cell")
    found = np.full(len(cells), -1)
    found[first["cell"].to_numpy(dtype=int)] = first["at"].to_numpy(dtype=int)
    return found
