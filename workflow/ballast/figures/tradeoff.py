"""The scatter of specialization against stability: what was learned against what was forgotten."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ballast.escape import one_line, shorten
from ballast.figures.labels import place_labels
from ballast.figures.palette import (
    OTHER,
    colour_of,
    families_of,
    label_of,
    marker_size,
    markers_of,
    new_figure,
    style,
)
from ballast.tables.notes import row_name
from ballast.tables.printed import absent
from ballast.tables.summary import Place, Row
from ballast.tradeoff import non_dominated

PANEL = (7.0, 5.6)  # inches
MOST_LABELS = 40


def scatter(places: Sequence[Place]) -> Figure:
    """A panel for each base and target, a key below. x is F, y is E, both in points."""
    across = max(1, min(2, len(places)))
    down = max(1, math.ceil(len(places) / across))
    with style():
        figure = new_figure(PANEL[0] * across, PANEL[1] * down + 0.7)
        panels = figure.subplots(down, across, squeeze=False).flatten()
        drawn = [_panel(axes, place) for axes, place in zip(panels, places, strict=False)]
        for axes in panels[len(places) :]:
            axes.set_axis_off()
        if not places:
            panels[0].text(0.5, 0.5, "no cells", ha="center", transform=panels[0].transAxes)
        families = {row["family"] for place in places for row in place.rows.values()}
        figure.legend(
            handles=_key(sorted(families, key=str)),
            loc="outside lower center",
            ncols=4,
            frameon=False,
        )
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes, points in zip(panels, drawn, strict=False):
            place_labels(axes, points)
    return figure


def _panel(axes: Axes, place: Place) -> list[dict[str, Any]]:
    """Draw one base and target; returns what is to be labelled, in the data's coordinates."""
    markers = markers_of(place.results.table)
    rows = [row for row in place.rows.values() if not absent(row["E"]) and not absent(row["F"])]
    axes.set_title(one_line(place.title), loc="left")
    axes.set_xlabel("Stability F: mean change upstream, points (left: forgot more)")
    axes.set_ylabel("Specialization E: change downstream, points")
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.axhline(0, color="#BBBBBB", linewidth=0.8, zorder=1)
    axes.axvline(0, color="#BBBBBB", linewidth=0.8, zorder=1)
    _paths(axes, rows)
    _front(axes, rows)
    front = non_dominated([(row["F"], row["E"]) for row in rows])
    many = len(rows) >= MOST_LABELS
    labels = [_point(axes, row, markers) for row in rows]
    axes.plot(0, 0, marker="+", color="black", markersize=11, markeredgewidth=1.8, zorder=5)
    labels.append({"x": 0.0, "y": 0.0, "text": "untouched base", "colour": "black", "radius": 6})
    axes.margins(0.12)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    for row, keep in zip(rows, front, strict=True):
        if keep or not many:
            _intervals(axes, row)
    _equal_o(axes)
    _absent(axes, list(place.rows.values()))
    if len(labels) > MOST_LABELS:
        for item, keep in zip(labels, [*front, True], strict=True):
            item["text"] = item["text"] if keep else ""
    return labels


def _point(axes: Axes, row: Row, markers: dict[str, str]) -> dict[str, Any]:
    colour, size = colour_of(row["family"]), marker_size(row["rank"])
    single = row["n_ok"] < 2
    axes.plot(
        row["F"],
        row["E"],
        marker=markers[row["method"]],
        markersize=size,
        color=colour,
        markerfacecolor="white" if single else colour,
        markeredgecolor=colour if single else "white",
        markeredgewidth=1.4 if single else 0.7,
        linestyle="none",
        zorder=4,
    )
    name = label_of(row)
    return {"x": row["F"], "y": row["E"], "text": name, "colour": colour, "radius": size / 2}


def _intervals(axes: Axes, row: Row) -> None:
    """The t intervals of F and E over seeds, cut at the panel's edge: over three seeds they are
    often wider than the range of the scores."""
    low, high = ({k: row.get(f"{k}.{end}") for k in ("F", "E")} for end in ("low", "high"))
    line: dict[str, Any] = {"color": colour_of(row["family"]), "linewidth": 1.0, "alpha": 0.6}
    line |= {"zorder": 3, "scalex": False, "scaley": False}
    if not absent(low["F"]):
        axes.plot([low["F"], high["F"]], [row["E"]] * 2, **line)
    if not absent(low["E"]):
        axes.plot([row["F"]] * 2, [low["E"], high["E"]], **line)


def _paths(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Join the ranks of each method and variant, lowest first."""
    paths: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["rank"] is not None:
            paths.setdefault((row["method"], row["variant"]), []).append(row)
    for path in paths.values():
        path.sort(key=lambda row: row["rank"])
        x, y = [row["F"] for row in path], [row["E"] for row in path]
        axes.plot(x, y, color=colour_of(path[0]["family"]), linewidth=1.2, alpha=0.4, zorder=2)


def _front(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """The Pareto front of the means, as the edge of what they dominate: nothing interpolated."""
    points = [(row["F"], row["E"]) for row in rows]
    front = sorted(p for p, keep in zip(points, non_dominated(points), strict=True) if keep)
    if front:
        x, y = [p[0] for p in front], [p[1] for p in front]
        style = {"color": "#333333", "linewidth": 1.1, "linestyle": (0, (4, 2))}
        axes.step(x, y, where="pre", zorder=2.5, **style)


def _equal_o(axes: Axes) -> None:
    """Faint lines of equal O = E + F; those that reach the right edge end with their value."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    span = max(high - low, right - left)
    step = next((s for s in (1, 2, 5, 10, 20, 50) if span / s <= 9), 100)
    first, last = math.ceil((left + low) / step), math.floor((right + high) / step)
    for o in (step * i for i in range(first, last + 1)):
        axes.plot([left, right], [o - left, o - right], color="#D9D9D9", linewidth=0.7, zorder=0.5)
        if low < o - right < high:
            where = {"ha": "left", "va": "center", "color": "#888888", "fontsize": 7}
            axes.text(right, o - right, f" O={o:g}", **where)
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)


def _absent(axes: Axes, rows: Sequence[Row]) -> None:
    """Name the rows that have no point, in the panel's lower left corner."""
    gone = [row for row in rows if absent(row["E"]) or absent(row["F"])]
    lines = [shorten(one_line(f"{row_name(row)}: {row['note']}"), 60) for row in gone]
    lines = [*lines[:5], f"and {len(lines) - 5} more"] if len(lines) > 6 else lines
    if lines:
        text = "\n".join(["Not shown:", *lines])
        box = {
            "facecolor": "white",
            "edgecolor": "#CCCCCC",
            "alpha": 0.85,
            "boxstyle": "round,pad=0.4",
        }
        axes.text(
            0.015, 0.02, text, transform=axes.transAxes, fontsize=7.5, color="#444444", va="bottom",
            bbox=box, zorder=6,
        )  # fmt: skip


def _key(families: list[Any]) -> list[Line2D]:
    dot = {"linestyle": "none", "marker": "o", "color": OTHER}
    return [
        *families_of(families),
        Line2D([], [], color="#333333", linestyle=(0, (4, 2)), label="Pareto front of the means"),
        Line2D([], [], color=OTHER, alpha=0.5, label="ranks of one method (marker grows with r)"),
        Line2D([], [], color="#C8C8C8", linewidth=0.9, label="equal O = E + F"),
        Line2D(
            [],
            [],
            color=OTHER,
            marker="o",
            markersize=5,
            label="mean, 95 % t interval (of many rows: the named)",
        ),
        Line2D([], [], markerfacecolor="white", label="one seed only", **dot),
    ]
