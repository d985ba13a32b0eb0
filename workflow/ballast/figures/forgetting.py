"""The heat map of forgetting: change of every upstream task's score, row by row."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from ballast.escape import one_line, shorten
from ballast.figures.palette import DIVERGING, colour_of, label_of, new_figure, style
from ballast.tables.printed import absent
from ballast.tables.summary import Place, Row

ROW, TASK = 0.17, 0.62  # inches
ONE_COLUMN = 45  # rows; more stand in two columns
MOST_ROWS = 160
MOST_NUMBERS = 1200  # cells that have their number written in them


def heat_map(place: Place) -> Figure:
    """Rows × upstream tasks, after − before in points; mean over seeds; white is no change."""
    tasks = place.points("upstream")
    rows = [r for r in place.rows.values() if not absent(r["F"])]
    left_out, rows = rows[MOST_ROWS:], rows[:MOST_ROWS]
    with style():
        if not rows or not tasks:
            return _empty(place)
        parts = _parts(rows)
        width = len(parts) * (1.9 + TASK * (len(tasks) + 1)) + 0.8
        figure = new_figure(width, 1.8 + ROW * max(4, len(parts[0])))
        figure.suptitle(
            f"{place.title}: change upstream, points"
            + (f" ({len(left_out)} rows are not shown)" if left_out else ""),
            x=0.01, ha="left", fontsize=10,
        )  # fmt: skip
        panels = figure.subplots(1, len(parts), squeeze=False)[0]
        norm = _norm(np.concatenate([_changes(place, part, tasks) for part in parts]))
        titles = [shorten(one_line(place.tasks[name]["title"]), 22) for name in tasks]
        for axes, part in zip(panels, parts, strict=True):
            image = _map(axes, part, _changes(place, part, tasks), [*titles, "F"], norm)
        bar = figure.colorbar(image, ax=panels, shrink=0.6, aspect=30, pad=0.01)
        bar.outline.set_visible(False)
    return figure


def _empty(place: Place) -> Figure:
    figure = new_figure(5, 1.5)
    axes = figure.subplots()
    axes.set_axis_off()
    axes.text(0.5, 0.5, one_line(f"{place.title}: no upstream scores"), ha="center")
    return figure


def _parts(rows: list[Row]) -> list[list[Row]]:
    if len(rows) <= ONE_COLUMN:
        return [rows]
    half = -(-len(rows) // 2)
    return [rows[:half], rows[half:]]


def _changes(place: Place, rows: list[Row], tasks: list[str]) -> np.ndarray:
    """Points, [rows, tasks + 1]; the last column is F; NaN where a score is missing."""
    found = [
        [_or_nan(row.get(f"score.{name}")) - _or_nan(place.base[f"score.{name}"]) for name in tasks]
        + [row["F"]]
        for row in rows
    ]
    return np.array(found, dtype=float)


def _or_nan(value: float | None) -> float:
    return float("nan") if absent(value) else float(value)  # type: ignore[arg-type]


def _norm(changes: np.ndarray) -> TwoSlopeNorm:
    """Centred at 0; both sides as far as the largest change, so that equal shades are equal."""
    largest = float(np.nanmax(np.abs(changes))) if np.isfinite(changes).any() else 1.0
    return TwoSlopeNorm(0, -max(largest, 1.0), max(largest, 1.0))


def _map(
    axes: Axes, rows: list[Row], changes: np.ndarray, titles: list[str], norm: TwoSlopeNorm
) -> object:
    image = axes.imshow(changes, cmap=DIVERGING, norm=norm, aspect="auto", interpolation="none")
    axes.set_xticks(range(len(titles)), titles, rotation=40, ha="left", fontsize=7.5)
    axes.tick_params(axis="x", top=True, bottom=False, labeltop=True, labelbottom=False, length=2)
    axes.set_yticks(range(len(rows)), [label_of(row, 22) for row in rows], fontsize=7)
    for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
        tick.set_color(colour_of(row["family"]))
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.axvline(len(titles) - 1.5, color="white", linewidth=4)
    for at in range(1, len(rows)):
        if rows[at]["family"] != rows[at - 1]["family"]:
            axes.axhline(at - 0.5, color="white", linewidth=3)
    if changes.size <= MOST_NUMBERS:
        _numbers(axes, changes, norm)
    return image


def _numbers(axes: Axes, changes: np.ndarray, norm: TwoSlopeNorm) -> None:
    for (y, x), value in np.ndenumerate(changes):
        if np.isfinite(value):
            colour = "white" if abs(norm(value) - 0.5) > 0.33 else "#222222"
            text = f"{round(value) + 0:d}".replace("-", "−")
            axes.text(x, y, text, ha="center", va="center", fontsize=6.5, color=colour)
