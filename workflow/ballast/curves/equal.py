"""Methods where they have learned the same, and the whole frontier of each.

An end point flatters a method that learned little: what has not been learned has displaced nothing.
Here stability is read where a cell's curve first reaches a given specialization; and a method is
shown with all its points, over learning rates, ranks and curves, instead of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ballast.curves import KINDS
from ballast.results import Results
from ballast.statistics.rows import row_keys, rows_of
from ballast.statistics.seeds import t_interval

SHARES = (0.5, 0.8)  # of the headroom: the levels of E where none are given
FRONTIER = (
    "row", "method", "title", "family", "variant", "rank", "learning_rate", "source", "share",
    "E", "F", "n", "front",
)  # fmt: skip


def levels_of(results: Results, base: str, target: str) -> tuple[float, ...]:
    """Shares of what the base could gain on the target (100 - its Target), in whole points of E."""
    cells = rows_of(results.table, base, target).cells
    before = (cells["target_mean"] - cells["E"]).median()
    if pd.isna(before):
        return ()
    found = {float(round(share * (100 - before))) for share in SHARES}
    return tuple(sorted(level for level in found if level > 0))


def crossings(curves: pd.DataFrame, level: float) -> pd.Series:
    """F by cell where E first reaches `level`, points; NaN for a curve that does not.

    curves: cell, share, E, F, one curve a cell. Between two points both are taken as linear; the
    first crossing counts, whatever E does later.
    """
    ordered = curves.dropna(subset=["E", "F"]).sort_values(["cell", "share"], ignore_index=True)
    before = ordered.groupby("cell", observed=True)[["E", "F"]].shift()
    hit = (ordered["E"] >= level).to_numpy()
    at = ordered[hit].drop_duplicates("cell")
    last = before.loc[at.index]
    # A curve whose first point is there already has nothing to interpolate.
    weight = ((level - last["E"]) / (at["E"] - last["E"])).fillna(1.0)
    found = at["F"] + (1 - weight) * (last["F"] - at["F"]).fillna(0.0)
    cells = pd.Index(curves["cell"].unique())
    return pd.Series(found.to_numpy(), index=at["cell"].to_numpy()).reindex(cells)


def at_equal_specialization(
    results: Results,
    base: str,
    target: str,
    levels: Sequence[float] | None = None,
    kinds: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Stability of each row where its cells reach the same E; indexed by row key.

    levels: points of E; by default `levels_of`. Columns for each level L (as `12` or `12.5`): `F@L`
    mean over the seeds that reached it, points; `F@L.low`, `F@L.high` their t interval of 95 %
    (missing with one seed); `reached@L` share of seeds that did, 0 to 1.
    kinds: of curves, the preferred first; by default the one kind that most of the cells have.
    Trajectory and rewind are different ways back and do not agree (early in training much is
    forgotten already), so that rows compare only where they have the same; `attrs["kinds"]` names
    those in use. A cell without any
    has its end point alone: below the level it has not reached it, exactly there it has, beyond it
    nothing is known and the seed is left out. The mean is over those who got there: where `reached`
    is small they may be the lucky seeds. A curve scored on fewer items (`curves.items`) has its E
    from those.
    """
    rows = rows_of(results.table, base, target)
    curves = _one_each(results.curves, rows.cells["id"], kinds or _commonest(results, rows.cells))
    has = rows.cells["id"].isin(set(curves["cell"])).to_numpy(bool)
    ends = {name: rows.cells[name].to_numpy(dtype=float, na_value=np.nan) for name in ("E", "F")}
    data: dict[str, np.ndarray] = {}
    for level in levels_of(results, base, target) if levels is None else levels:
        on_curve = rows.cells["id"].map(crossings(curves, level)).to_numpy(dtype=float)
        f = np.where(has, on_curve, np.where(ends["E"] == level, ends["F"], np.nan))
        known = has | (ends["E"] <= level)
        spread = t_interval(rows.arrange(f))
        count = np.nansum(rows.arrange(known.astype(float)), axis=1)
        data |= {
            f"F@{level:g}": spread.mean,
            f"F@{level:g}.low": spread.low,
            f"F@{level:g}.high": spread.high,
            f"reached@{level:g}": spread.n / np.where(count, count, np.nan),
        }
    found = pd.DataFrame(data, index=pd.Index(rows.keys, name="row", dtype=object))
    found.attrs["kinds"] = sorted(curves["kind"].unique())
    return found


def _commonest(results: Results, cells: pd.DataFrame) -> tuple[str, ...]:
    """The kind of curve that most of the cells have; of as many, the trajectory."""
    here = results.curves[results.curves["cell"].isin(set(cells["id"])).to_numpy(bool)]
    counts = here.groupby("kind")["cell"].nunique()
    return (max(KINDS, key=lambda kind: counts.get(kind, 0)),)


def _one_each(curves: pd.DataFrame, cells: pd.Series, kinds: Sequence[str]) -> pd.DataFrame:
    """One curve of each of the cells, of the first of the kinds that it has."""
    chosen = curves["cell"].isin(set(cells)) & curves["kind"].isin(list(kinds))
    found = curves[chosen.to_numpy(bool)]
    order = found["kind"].map({kind: place for place, kind in enumerate(kinds)})
    best = order.groupby(found["cell"].to_numpy()).transform("min")
    return found[(order == best).to_numpy(bool)]


def frontier(results: Results, base: str, target: str) -> pd.DataFrame:
    """Every point that is known of each method, over ranks, variants, rates and curves.

    Columns: row (its key), method, title, family, variant, rank (Int64), learning_rate, source
    (`results`; `tune`: a rate of the grid, its E on validation items; `trajectory`, `rewind`: a
    point on the way, neither base nor end), share (of the way; 1 for end points), E and F (means
    over cells, points), n (cells), front (no other point of the method has both E and F as high and
    one higher).
    """
    rows = rows_of(results.table, base, target)
    needed = [*_WHO[1:], "id", "learning_rate", "E", "F"]
    cells = rows.cells.loc[(rows.cells["status"] == "ok").to_numpy(bool), needed]
    names = cells.assign(row=row_keys(cells), variant=cells["variant"].fillna(""))
    parts = [_ends(names), _rates(results, names, base, target), _ways(results, names)]
    parts = [part.reindex(columns=list(FRONTIER)) for part in parts if len(part)]
    if not parts:
        return pd.DataFrame(columns=list(FRONTIER))
    found = pd.concat([part.astype(object) for part in parts], ignore_index=True)
    numbers = dict.fromkeys(("learning_rate", "share", "E", "F"), float)
    found = found.astype(numbers | {"rank": "Int64", "n": int})
    front = pd.Series(False, index=found.index)
    for _, block in found.groupby("method"):
        front[block.index] = _front(block["E"].to_numpy(), block["F"].to_numpy())
    order = ["method", "row", "source", "learning_rate", "share"]
    return found.assign(front=front.to_numpy(bool)).sort_values(order, ignore_index=True)


_WHO = ["row", "method", "title", "family", "variant", "rank"]


def _means(points: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    points = points.dropna(subset=["E", "F"])
    groups = points.groupby(by, dropna=False, observed=True)
    return groups.agg(E=("E", "mean"), F=("F", "mean"), n=("E", "size")).reset_index()


def _ends(names: pd.DataFrame) -> pd.DataFrame:
    return _means(names, [*_WHO, "learning_rate"]).assign(source="results", share=1.0)


def _rates(results: Results, names: pd.DataFrame, base: str, target: str) -> pd.DataFrame:
    rates = results.rates
    if rates is None or not {"E", "F"} <= set(rates.columns):
        return pd.DataFrame()
    chosen = (rates["base"] == base) & (rates["target"] == target) & (rates["status"] == "ok")
    rates = rates[chosen.to_numpy(bool)]
    about = names.drop_duplicates("method").set_index("method")
    rates = rates.assign(
        row=row_keys(rates),
        title=rates["method"].map(about["title"]).fillna(rates["method"]),
        family=rates["method"].map(about["family"]),
    )
    return _means(rates, [*_WHO, "learning_rate"]).assign(source="tune", share=1.0)


def _ways(results: Results, names: pd.DataFrame) -> pd.DataFrame:
    between = results.curves[results.curves["share"].between(0, 1, inclusive="neither")]
    between = between[["cell", "kind", "share", "E", "F"]].rename(columns={"kind": "source"})
    points = between.merge(
        names[[*_WHO, "learning_rate", "id"]], left_on="cell", right_on="id", how="inner"
    )
    return _means(points, [*_WHO, "learning_rate", "source", "share"])


def _front(e: np.ndarray, f: np.ndarray) -> np.ndarray:
    """For each point whether no other is as high in both coordinates and higher in one."""
    points, place = np.unique(np.column_stack([e, f]), axis=0, return_inverse=True)
    # From the highest E down (and F, where E ties) a point needs a higher F than all before it.
    down = points[::-1, 1]
    best = np.maximum.accumulate(np.concatenate([[-np.inf], down[:-1]]))
    return (down > best)[::-1][place.reshape(-1)]
