"""The rows of a table: cells that differ in nothing but their seed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ballast.escape import shorten
from ballast.statistics import seeds

STATES = {
    "failed": "failed",
    "missing": "missing",
    "stale": "stale",
    "rescore": "to be scored again",
}
# Settings and identities: numbers of which a mean over seeds says nothing.
_NO_QUANTITY = ("rank", "seed", "learning_rate", "scale")
# What is the same for every seed: a mean is all that there is to say.
_CONSTANT = ("base.", "base_extra.", "n.")


def row_key(method: str, rank: int | None, variant: str | None, origin: str | None = "") -> str:
    """How a suite names a row: method, method-r8, method-r8+variant; @ORIGIN if made elsewhere."""
    label = method if rank is None or pd.isna(rank) else f"{method}-r{int(rank)}"
    label = f"{label}+{variant}" if isinstance(variant, str) and variant else label
    return f"{label}@{origin}" if isinstance(origin, str) and origin else label


def row_keys(table: pd.DataFrame) -> list[str]:
    """The row key of every cell of a tidy table; one without origins is our own."""
    origin = table["origin"] if "origin" in table else [""] * len(table)
    return [
        row_key(*names)
        for names in zip(table["method"], table["rank"], table["variant"], origin, strict=True)
    ]


@dataclass(frozen=True)
class Rows:
    """Cells of one base and target as rows x seeds.

    cells: the tidy table's rows of them, all but the unplanned; keys: of the rows, in the order of
    the tidy table; row: of each cell, the position of its key; seeds: all seeds that are ok, in
    ascending order; place: [row, seed], the position in `cells` of the cell that is ok, or -1;
    doubles: how many cells that are ok are left out because their row has another of that seed.
    """

    cells: pd.DataFrame
    keys: tuple[str, ...]
    row: np.ndarray
    seeds: np.ndarray
    place: np.ndarray
    doubles: int

    def values(self, name: str) -> np.ndarray:
        """The numbers of a column, [row, seed]; NaN where there is no cell that is ok."""
        return self.arrange(self.cells[name].to_numpy(dtype=float, na_value=np.nan))

    def arrange(self, of_cells: np.ndarray) -> np.ndarray:
        """[cell, ...] as [row, seed, ...], NaN where there is no cell that is ok."""
        found = of_cells[np.maximum(self.place, 0)].astype(float)
        found[self.place < 0] = np.nan
        return found

    def n_ok(self) -> np.ndarray:
        """Seeds that are ok, of each row."""
        return (self.place >= 0).sum(axis=1)


def rows_of(table: pd.DataFrame, base: str, target: str) -> Rows:
    """Arrange the planned cells of a base and target. Where a row has two cells of one seed that
    are ok (made under other settings), the first counts."""
    chosen = (table["base"] == base) & (table["target"] == target)
    cells = table[chosen.to_numpy(bool) & (table["status"] != "unplanned").to_numpy(bool)]
    cells = cells.reset_index(drop=True)
    row, keys = pd.factorize(np.array(row_keys(cells), dtype=object))
    ok = np.flatnonzero((cells["status"] == "ok").to_numpy(bool))
    seed, known = pd.factorize(cells["seed"].to_numpy(dtype=np.int64)[ok], sort=True)
    place = np.full((len(keys), len(known)), -1)
    at = pd.DataFrame({"row": row[ok], "seed": seed, "cell": ok}).drop_duplicates(["row", "seed"])
    place[at["row"], at["seed"]] = at["cell"]
    doubles = len(ok) - int((place >= 0).sum())
    return Rows(cells, tuple(keys), row, np.asarray(known), place, doubles)


def points_tasks(cells: pd.DataFrame, role: str) -> list[str]:
    """Names of the tasks of a role that are measured in points, sorted."""
    found: dict[str, Any] = {}
    for text in cells.loc[(cells["status"] == "ok").to_numpy(bool), "tasks"].drop_duplicates():
        found |= json.loads(text)
    return sorted(k for k, v in found.items() if v["role"] == role and v["unit"] == "points")


def quantities(cells: pd.DataFrame) -> list[str]:
    """Columns of the tidy table that are measured and of which some cell has a number."""
    return [
        name
        for name in cells.columns
        if name not in _NO_QUANTITY
        and pd.api.types.is_numeric_dtype(cells[name].dtype)
        and cells[name].notna().any()
    ]


def frame_of(rows: Rows) -> pd.DataFrame:
    """What is known of each row without comparing it: identity, seeds, and every quantity's mean,
    sd and t interval over the seeds that are ok."""
    first = pd.Series(np.arange(len(rows.row))).groupby(rows.row).first().to_numpy()
    data: dict[str, Any] = {
        name: rows.cells[name].iloc[first].to_numpy() for name in ("method", "title", "family")
    }
    data["variant"] = rows.cells["variant"].fillna("").iloc[first].to_numpy()
    data["origin"] = rows.cells["origin"].fillna("").iloc[first].to_numpy()
    elsewhere = data["origin"] != ""
    data["title"] = np.where(elsewhere, data["title"] + " @" + data["origin"], data["title"])
    data["rank"] = rows.cells["rank"].iloc[first].astype("Int64").to_numpy(dtype=object)
    data["n_ok"] = rows.n_ok()
    data["n_planned"] = np.bincount(rows.row, minlength=len(rows.keys))
    data["seeds"] = [tuple(int(s) for s in rows.seeds[p >= 0]) for p in rows.place]
    data["note"] = _notes(rows)
    data |= _numbers(rows)
    frame = pd.DataFrame(data, index=pd.Index(rows.keys, name="row", dtype=object))
    return frame.astype({"rank": "Int64", "n_ok": "int64", "n_planned": "int64"})


def _numbers(rows: Rows) -> dict[str, np.ndarray]:
    names = quantities(rows.cells)
    table = np.column_stack(
        [rows.cells[k].to_numpy(dtype=float, na_value=np.nan) for k in names]
        or [np.empty((len(rows.cells), 0))]
    )
    spread = seeds.t_interval(np.moveaxis(rows.arrange(table), 1, -1))
    found: dict[str, np.ndarray] = {}
    for at, name in enumerate(names):
        found[name] = spread.mean[:, at]
        if not name.startswith(_CONSTANT):
            found[f"{name}.sd"] = spread.sd[:, at]
            found[f"{name}.low"], found[f"{name}.high"] = spread.low[:, at], spread.high[:, at]
    return found


def _notes(rows: Rows) -> list[str]:
    """Why seeds of a row do not count, of every row."""
    status = rows.cells["status"].to_numpy(dtype=object)
    reason = rows.cells["reason"].fillna("").to_numpy(dtype=object)
    bad: dict[int, list[tuple[str, str]]] = {}
    for at in np.flatnonzero(status != "ok"):
        bad.setdefault(int(rows.row[at]), []).append((str(status[at]), str(reason[at])))
    return [status_note(bad.get(at, ())) for at in range(len(rows.keys))]


def status_note(bad: Iterable[tuple[str, str]]) -> str:
    """ "1 failed (diverged: NaN), 2 missing" from (status, reason) of cells that do not count."""
    parts = []
    bad = list(bad)
    for status, word in STATES.items():
        reasons = [reason for state, reason in bad if state == status]
        if reasons:
            said = sorted({shorten(reason, 80) for reason in reasons} - {""})
            why = f" ({'; '.join(said)})" if status == "failed" and said else ""
            parts.append(f"{len(reasons)} {word}{why}")
    return ", ".join(parts)


def control_of(rows: Rows, control: str) -> str | None:
    """The key of the control's row: the row of that key; else, of our own rows of that method with
    seeds that are ok, one without variant if there is any, with most seeds, of the middle rank."""
    if control in rows.keys:
        return control
    own = rows.cells[(rows.cells["origin"].fillna("") == "").to_numpy(bool)]
    n_ok, plain = rows.n_ok(), own.drop_duplicates(["method", "rank", "variant"])
    found = [
        (row_key(*names), bool(names[2]), 0 if pd.isna(names[1]) else int(names[1]))
        for names in zip(plain["method"], plain["rank"], plain["variant"].fillna(""), strict=True)
        if names[0] == control
    ]
    counts = {key: int(n_ok[rows.keys.index(key)]) for key, _, _ in found}
    found = [item for item in found if counts[item[0]] > 0]
    if not found:
        return None
    best = min((varied, -counts[key]) for key, varied, _ in found)
    return _middle([(rank, key) for key, varied, rank in found if (varied, -counts[key]) == best])


def _middle(found: Sequence[tuple[int, str]]) -> str:
    return sorted(found)[(len(found) - 1) // 2][1]
