"""The critical-difference diagram: mean ranks, and which rows the tests do not tell apart.

After Demšar (JMLR 7, 2006), with two changes. The blocks that are ranked are seeds, and rows are
joined by the pairwise tests of `statistics.analyse`, paired by seed and item and corrected for
their number, not by Nemenyi's constant, which assumes independent data sets.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ballast.figures.palette import (
    COLOURS,
    OTHER,
    colour_of,
    families_of,
    label_of,
    new_figure,
    style,
)
from ballast.statistics.analysis import LEVEL
from ballast.tables.printed import absent
from ballast.tables.summary import Place, Row

ROW = 0.17  # inches
MOST_ROWS = 100


def mean_ranks(place: Place, quantity: str = "O") -> pd.DataFrame:
    """Rank of every row among the rows of each seed, 1 is best, ties shared. Index: row; columns:
    mean, seeds (how many). Only seeds that all rows with two seeds or more have."""
    keys = {(r["method"], r["variant"], r["rank"]): k for k, r in place.rows.items()}
    good = place.cells[(place.cells["status"] == "ok") & place.cells[quantity].notna()]
    names = good[["method", "variant", "rank"]].astype(object)
    names = names.where(names.notna(), None)
    row = [keys[name] for name in names.itertuples(index=False, name=None)]
    values = pd.DataFrame({"row": row, "seed": good["seed"], "value": good[quantity]})
    wide = values.pivot_table(index="row", columns="seed", values="value", sort=False)
    wide = wide[wide.notna().sum(axis=1) > 1].dropna(axis=1)
    ranks = wide.rank(axis=0, ascending=False)
    found = pd.DataFrame({"mean": ranks.mean(axis=1), "seeds": ranks.count(axis=1)})
    return found.sort_values("mean", kind="stable")


def joined(order: list[str], pairs: pd.DataFrame) -> list[tuple[int, int]]:
    """Longest runs (first, last) of neighbours in `order` of which no pair is told apart.

    pairs: of one quantity. A pair without a test is not told apart. Runs of one row are left out.
    """
    place = {key: at for at, key in enumerate(order)}
    apart = pairs.loc[pairs["p_adjusted"] < 1 - LEVEL, ["a", "b"]]
    # For each row, the nearest row further down that it is told apart from.
    stop = [len(order)] * len(order)
    for a, b in apart.itertuples(index=False, name=None):
        if a in place and b in place:
            first, last = sorted((place[a], place[b]))
            stop[first] = min(stop[first], last)
    runs: list[tuple[int, int]] = []
    for first in range(len(order)):
        last = min(stop[first:], default=len(order)) - 1
        if last > first and (not runs or last > runs[-1][1]):
            runs.append((first, last))
    return runs


def columns_of(runs: list[tuple[int, int]]) -> list[int]:
    """The first column in which each run meets no other."""
    ends: list[int] = []
    found = []
    for first, last in runs:
        at = next((i for i, end in enumerate(ends) if end < first), len(ends))
        ends[at : at + 1] = [last]
        found.append(at)
    return found


def critical_difference(place: Place, quantity: str = "O") -> Figure:
    """Rows from the best mean rank down; bars at the right join those that are not told apart."""
    ranks = mean_ranks(place, quantity)
    order = [str(key) for key in ranks.index]
    pairs = place.analysis.pairs
    runs = joined(order, pairs[pairs["quantity"] == quantity])
    left_out = max(0, len(order) - MOST_ROWS)
    order = order[:MOST_ROWS]
    runs = [(a, min(b, len(order) - 1)) for a, b in runs if a < len(order) - 1]
    at = columns_of(runs)
    with style():
        figure = new_figure(6.6, 1.7 + ROW * max(4, len(order)))
        axes = figure.subplots()
        title = f"{place.title}: mean rank by {quantity} over {_seeds(ranks)} seeds"
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
        if len(order) < 2:
            axes.text(0.5, 0.5, "fewer than two rows have two seeds", ha="center", va="center")
            axes.set_axis_off()
            return figure
        _dots(axes, [place.rows[key] for key in order], ranks, quantity)
        _bars(axes, list(zip(runs, at, strict=True)), len(ranks))
        if left_out:
            note = f"{left_out} rows further down are not shown"
            axes.text(0, -0.005, note, transform=axes.transAxes, va="top", fontsize=7)
        families = [place.rows[key]["family"] for key in order]
        figure.legend(
            handles=[*families_of([f for f in COLOURS if f in families]), *_key()], ncols=3,
            frameon=False, loc="outside lower left", fontsize=7.5,
        )  # fmt: skip
    return figure


def _key() -> list[Line2D]:
    return [
        Line2D([], [], color=OTHER, marker="o", linestyle="none", label="mean over seeds"),
        Line2D(
            [], [], color=OTHER, alpha=0.4, linewidth=2.4, label="ranks it may hold by the tests"
        ),
        Line2D([], [], color="#333333", linewidth=2.0, label="no two of these are told apart"),
    ]


def _seeds(ranks: pd.DataFrame) -> int:
    return int(ranks["seeds"].max()) if len(ranks) else 0


def _dots(axes: Axes, rows: list[Row], ranks: pd.DataFrame, quantity: str) -> None:
    for at, row in enumerate(rows):
        colour = colour_of(row["family"])
        low, high = row[f"{quantity}.rank_low"], row[f"{quantity}.rank_high"]
        if not absent(low):
            axes.plot([low, high], [at, at], color=colour, linewidth=2.4, alpha=0.3)
        mean = ranks.loc[row["key"], "mean"]
        axes.plot(mean, at, marker="o", color=colour, markersize=4.5, linestyle="none")
    axes.set_yticks(range(len(rows)), [label_of(row, 28) for row in rows], fontsize=7)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(colour_of(row["family"]))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#F0F0F0", linewidth=0.7)
    axes.set_xlabel("rank, 1 is best")


def _bars(axes: Axes, runs: list[tuple[tuple[int, int], int]], start: int) -> None:
    """Vertical bars beside the ranks, one for each run of rows that are not told apart."""
    columns = 1 + max((at for _, at in runs), default=0)
    step = min(start * 0.035, start * 0.5 / columns)
    for (first, last), at in runs:
        x = start + 0.8 + step * (at + 0.5)
        axes.plot(
            [x, x], [first - 0.25, last + 0.25], color="#333333", linewidth=2.0,
            solid_capstyle="butt",
        )  # fmt: skip
    axes.set_xlim(0.4, start + 0.8 + step * columns)
    axes.set_xticks([t for t in axes.get_xticks() if 1 <= t <= start])
