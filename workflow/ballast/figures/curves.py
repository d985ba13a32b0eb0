"""Learn–forget curves: the way a method takes from the untouched base to its end point."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ballast.figures.labels import place_labels
from ballast.figures.palette import (
    COLOURS,
    colour_of,
    families_of,
    label_of,
    markers_of,
    new_figure,
    style,
)
from ballast.tables.summary import Place
from ballast.tradeoff import non_dominated

TITLES = {
    "trajectory": "Checkpoints of training",
    "rewind": "α-rewind of the finished cell: W0 + αΔW",
}
MOST_LABELS = 30


def mean_curves(place: Place) -> pd.DataFrame:
    """Mean E and F over seeds: columns kind, row, share, E, F; sorted."""
    names = place.cells.loc[place.cells["status"] == "ok", ["id", "method", "variant", "rank"]]
    keys = {(r["method"], r["variant"], r["rank"]): k for k, r in place.rows.items()}
    plain = names.astype(object).where(names.notna(), None)
    cells = {row[0]: keys[row[1:]] for row in plain.itertuples(index=False, name=None)}
    curves = place.results.curves
    here = curves[curves["cell"].isin(cells)]
    here = here.assign(row=here["cell"].map(cells))
    for name in ("E", "F", "share"):
        here[name] = pd.to_numeric(here[name])
    return here.groupby(["kind", "row", "share"])[["E", "F"]].mean().dropna().reset_index()


def learn_forget(places: Sequence[Place]) -> Figure | None:
    """A panel for each place and kind of curve; None if no cell has a curve."""
    blocks = [
        (place, kind, block)
        for place in places
        for kind, block in mean_curves(place).groupby("kind", sort=False)
    ]
    if not blocks:
        return None
    with style():
        across = min(2, len(blocks))
        down = -(-len(blocks) // across)
        figure = new_figure(6.0 * across, 4.8 * down + 0.5)
        panels = figure.subplots(down, across, squeeze=False).flatten()
        drawn = [_panel(a, *block) for a, block in zip(panels, blocks, strict=False)]
        for axes in panels[len(blocks) :]:
            axes.set_axis_off()
        families = {row["family"] for place, _, _ in blocks for row in place.rows.values()}
        figure.legend(
            handles=families_of([f for f in COLOURS if f in families]), ncols=4, frameon=False,
            loc="outside lower center",
        )  # fmt: skip
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes, items in zip(panels, drawn, strict=False):
            place_labels(axes, items, fontsize=7)
    return figure


def _panel(axes: Axes, place: Place, kind: str, block: pd.DataFrame) -> list[dict]:
    axes.set_title(f"{place.title}\n{TITLES.get(kind, kind)}", loc="left", fontsize=9)
    axes.set_xlabel("Stability F, points (left: forgot more)")
    axes.set_ylabel("Specialization E, points")
    axes.grid(color="#EEEEEE", linewidth=0.8)
    markers = markers_of(place.results.table)
    labels = []
    paths = list(block.groupby("row", sort=False))
    for key, path in paths:
        row, path = place.rows[str(key)], path.sort_values("share")
        colour = colour_of(row["family"])
        axes.plot(
            path["F"], path["E"], color=colour, linewidth=1.1, marker=".", markersize=3,
            alpha=0.8 if len(paths) <= MOST_LABELS else 0.45,
        )  # fmt: skip
        end = path.iloc[-1]
        axes.plot(
            end["F"], end["E"], color=colour, marker=markers[row["method"]], markersize=6,
            markeredgecolor="white", linestyle="none", zorder=4,
        )  # fmt: skip
        labels.append(
            {"x": end["F"], "y": end["E"], "text": label_of(row, 20), "colour": colour, "radius": 3}
        )
    axes.plot(0, 0, marker="+", color="black", markersize=11, markeredgewidth=1.8, zorder=5)
    if len(labels) > MOST_LABELS:
        front = non_dominated([(item["x"], item["y"]) for item in labels])
        for item, keep in zip(labels, front, strict=True):
            item["text"] = item["text"] if keep else ""
    return labels
