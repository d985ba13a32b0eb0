"""The scatter of specialization against stability: what was learned against what was forgotten.

Drawn without pyplot and without the user's settings, so the same table gives the same bytes. Text
from elsewhere is never read as mathematics.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ballast.declare import FAMILIES
from ballast.escape import one_line, shorten
from ballast.files import replacing
from ballast.labels import place_labels
from ballast.summary import tradeoff_tables
from ballast.tradeoff import non_dominated

# Okabe and Ito's colours, told apart with every common kind of colour blindness.
COLOURS = dict(zip(FAMILIES, ("#D55E00", "#CC79A7", "#0072B2", "#009E73"), strict=True))
OTHER = "#666666"
MARKERS = "osD^vPX<>ph*d8H"
SETTINGS = {
    "svg.hashsalt": "ballast",
    "svg.fonttype": "path",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "text.parse_math": False,
    "axes.unicode_minus": True,
}
PANEL = (7.0, 5.6)  # inches
MOST_LABELS = 40


@contextmanager
def _style() -> Iterator[None]:
    with (
        matplotlib.style.context("default"),
        mpl.rc_context(SETTINGS),
        warnings.catch_warnings(),
    ):
        # A letter that the font lacks is drawn as a box; the tables have the name.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def write_scatter(tidy: pd.DataFrame, folder: Path, name: str = "tradeoff") -> list[Path]:
    """Write NAME.png and NAME.svg into `folder`, atomically; returns their paths.

    The same table gives the same bytes with the same version of matplotlib.
    """
    metadata = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    written = []
    with _style():
        figure = scatter(tidy)
        for kind, facts in metadata.items():
            written.append(folder / f"{name}.{kind}")
            with replacing(written[-1]) as temporary:
                figure.savefig(temporary, format=kind, dpi=150, metadata=facts)
    return written


def scatter(tidy: pd.DataFrame) -> Figure:
    """The figure: a panel for each base and target, a key below. x is F, y is E, both in points."""
    tables = tradeoff_tables(tidy)
    across = max(1, min(2, len(tables)))
    down = max(1, math.ceil(len(tables) / across))
    with _style():
        figure = Figure(figsize=(PANEL[0] * across, PANEL[1] * down + 0.7), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(down, across, squeeze=False).flatten()
        markers = _markers(tidy)
        drawn = [
            _panel(axes, table, markers)
            for axes, table in zip(panels, tables.values(), strict=False)
        ]
        for axes in panels[len(tables) :]:
            axes.set_axis_off()
        if not tables:
            panels[0].text(0.5, 0.5, "no cells", ha="center", transform=panels[0].transAxes)
        families = [f for f in COLOURS if (tidy["family"] == f).any()]
        figure.legend(handles=_key(families), loc="outside lower center", ncols=4, frameon=False)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes, points in zip(panels, drawn, strict=False):
            place_labels(axes, points)
    return figure


def _markers(tidy: pd.DataFrame) -> dict[str, str]:
    """A marker for each method, the same in every panel; repeated if a family has over 15."""
    found = {}
    for family in [*FAMILIES, None]:
        chosen = ~tidy["family"].isin(FAMILIES) if family is None else tidy["family"] == family
        for at, method in enumerate(sorted(set(tidy.loc[chosen, "method"].dropna()))):
            found[method] = MARKERS[at % len(MARKERS)]
    return found


def _points(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = table.iloc[1:]
    shown = rows[rows["E"].notna() & rows["F"].notna()]
    return shown.to_dict("records")


def _panel(axes: Axes, table: pd.DataFrame, markers: dict[str, str]) -> list[dict[str, Any]]:
    """Draw one base and target; returns what is to be labelled, in the data's coordinates."""
    rows = _points(table)
    axes.set_title(one_line(f"{table.attrs['base']} tuned on {table.attrs['target']}"), loc="left")
    axes.set_xlabel("Stability F: mean change upstream, points (left: forgot more)")
    axes.set_ylabel("Specialization E: change downstream, points")
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.axhline(0, color="#BBBBBB", linewidth=0.8, zorder=1)
    axes.axvline(0, color="#BBBBBB", linewidth=0.8, zorder=1)
    _paths(axes, rows)
    _front(axes, rows)
    labels = [_point(axes, row, markers) for row in rows]
    axes.plot(0, 0, marker="+", color="black", markersize=11, markeredgewidth=1.8, zorder=5)
    labels.append({"x": 0.0, "y": 0.0, "text": "untouched base", "colour": "black", "radius": 6})
    axes.margins(0.12)
    _equal_o(axes)
    _absent(axes, table)
    if len(labels) > MOST_LABELS:
        front = non_dominated([(row["F"], row["E"]) for row in rows])
        labels = [item for item, keep in zip(labels, [*front, True], strict=True) if keep]
    return labels


def _size(rank: Any) -> float:
    """Diameter of a marker in points: grows by one with each doubling of the rank."""
    return 7.0 if pd.isna(rank) else min(13.0, 4.5 + 0.9 * math.log2(rank + 1))


def _colour(family: Any) -> str:
    return OTHER if pd.isna(family) else COLOURS.get(family, OTHER)


def _point(axes: Axes, row: dict[str, Any], markers: dict[str, str]) -> dict[str, Any]:
    colour, size = _colour(row["family"]), _size(row["rank"])
    error = {"fmt": "none", "ecolor": colour, "elinewidth": 1.0, "capsize": 2, "alpha": 0.6}
    known = {k: row[f"{k} sd"] for k in ("E", "F")}
    if not any(pd.isna(sd) for sd in known.values()):
        axes.errorbar(row["F"], row["E"], xerr=known["F"], yerr=known["E"], zorder=3, **error)
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
    rank = "" if pd.isna(row["rank"]) else f" r{int(row['rank'])}"
    name = shorten(one_line(f"{row['title']}"), 24) + rank
    name += f" +{shorten(one_line(row['variant']), 20)}" if row["variant"] else ""
    return {"x": row["F"], "y": row["E"], "text": name, "colour": colour, "radius": size / 2}


def _paths(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Join the ranks of each method and variant, lowest first."""
    paths: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if not pd.isna(row["rank"]):
            paths.setdefault((row["method"], row["variant"]), []).append(row)
    for path in paths.values():
        path.sort(key=lambda row: row["rank"])
        x, y = [row["F"] for row in path], [row["E"] for row in path]
        axes.plot(x, y, color=_colour(path[0]["family"]), linewidth=1.2, alpha=0.4, zorder=2)


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


def _absent(axes: Axes, table: pd.DataFrame) -> None:
    """Name the rows that have no point, in the panel's lower left corner."""
    rows = table.iloc[1:]
    gone = rows[rows["E"].isna() | rows["F"].isna()].to_dict("records")
    lines = [
        f"{row['title']} r{row['rank']}" if not pd.isna(row["rank"]) else row["title"]
        for row in gone
    ]
    lines = [
        shorten(one_line(f"{name}: {row['note']}"), 60)
        for name, row in zip(lines, gone, strict=True)
    ]
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


def _key(families: list[str]) -> list[Line2D]:
    dots = {"linestyle": "none", "marker": "o"}
    found = [Line2D([], [], color=COLOURS[f], label=f, **dots) for f in families]
    found += [
        Line2D([], [], color="#333333", linestyle=(0, (4, 2)), label="Pareto front of the means"),
        Line2D([], [], color=OTHER, alpha=0.5, label="ranks of one method (marker grows with r)"),
        Line2D([], [], color="#C8C8C8", linewidth=0.9, label="equal O = E + F"),
        Line2D([], [], color=OTHER, marker="o", markersize=5, label="mean ± sd over seeds"),
        Line2D([], [], color=OTHER, markerfacecolor="white", label="one seed only", **dots),
    ]
    return found
