"""E, F and O against the rank: what more parameters buy, and what they cost."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ballast.figures.palette import colour_of, label_of, markers_of, new_figure, style
from ballast.statistics.analysis import COMPARED
from ballast.tables.printed import absent
from ballast.tables.summary import Place, Row

TITLES = {
    "E": "Specialization E, points",
    "F": "Stability F, points",
    "O": "O = E + F, points",
}
MOST_BARS = 12  # paths that keep their intervals; more would cover each other
MOST_KEYS = 60


def rank_sweep(place: Place) -> Figure:
    """A panel for each of E, F and O; a line for each method that was run at two ranks or more."""
    paths = _paths(place)
    with style():
        figure = new_figure(10.5, 3.6 + 0.17 * -(-min(len(paths), MOST_KEYS) // 5))
        figure.suptitle(place.title, x=0.01, ha="left", fontsize=10)
        panels = figure.subplots(1, len(COMPARED))
        markers = markers_of(place.results.table)
        for axes, quantity in zip(panels, COMPARED, strict=True):
            _panel(axes, paths, quantity, markers)
        if paths:
            shown = paths[:MOST_KEYS]
            handles = [_line(path, markers) for path in shown]
            figure.legend(
                handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8
            )
    return figure


def _paths(place: Place) -> list[list[Row]]:
    """Rows of each method and variant by rank, where there are two with a mean."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in place.rows.values():
        if row["rank"] is not None and not absent(row["O"]):
            found.setdefault((row["method"], row["variant"]), []).append(row)
    paths = [sorted(path, key=lambda row: row["rank"]) for path in found.values()]
    return [path for path in paths if len(path) > 1]


def _panel(axes: Axes, paths: list[list[Row]], quantity: str, markers: dict[str, str]) -> None:
    axes.set(title=TITLES[quantity], xlabel="rank")
    axes.title.set_fontsize(9)
    axes.grid(color="#EEEEEE", linewidth=0.8)
    axes.axhline(0, color="#999999", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    if not paths:
        axes.text(0.5, 0.5, "no method at two ranks", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    values = sorted({int(row["rank"]) for path in paths for row in path})
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.minorticks_off()
    for at, path in enumerate(paths):
        # Paths stand a little apart, so that bars at one rank can be told apart.
        x = np.array([row["rank"] for row in path], dtype=float)
        x *= 2 ** (0.22 * ((at + 0.5) / len(paths) - 0.5))
        y = [row[quantity] for row in path]
        line = _line(path, markers)
        axes.plot(
            x, y, color=line.get_color(), marker=line.get_marker(), linestyle=line.get_linestyle(),
            markersize=5, linewidth=1.3, markeredgecolor="white", markeredgewidth=0.5,
            alpha=0.9 if len(paths) <= MOST_BARS else 0.6,
        )  # fmt: skip
    axes.set_ylim(axes.get_ylim())
    if len(paths) <= MOST_BARS:
        _bars(axes, paths, quantity)


def _bars(axes: Axes, paths: list[list[Row]], quantity: str) -> None:
    """The t intervals over seeds, cut at the panel's edge."""
    for at, path in enumerate(paths):
        shift = 2 ** (0.22 * ((at + 0.5) / len(paths) - 0.5))
        for row in path:
            low, high = row.get(f"{quantity}.low"), row.get(f"{quantity}.high")
            if not absent(low):
                axes.plot(
                    [row["rank"] * shift] * 2, [low, high], color=colour_of(row["family"]),
                    linewidth=0.9, alpha=0.45, scaley=False, zorder=1.5,
                )  # fmt: skip


def _line(path: list[Row], markers: dict[str, str]) -> Line2D:
    first = path[0]
    dashed = (0, (3, 1.5)) if first["variant"] else "-"
    return Line2D(
        [], [], color=colour_of(first["family"]), marker=markers[first["method"]],
        linestyle=dashed, markersize=5, linewidth=1.3, label=label_of(first, rank=False),
    )  # fmt: skip
