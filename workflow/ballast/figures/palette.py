"""Colours, markers and type of every figure and page: a family looks the same everywhere."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ballast.declare import FAMILIES
from ballast.escape import one_line, shorten
from ballast.files import replacing

# Okabe and Ito's colours, told apart with every common kind of colour blindness.
COLOURS = dict(zip(FAMILIES, ("#D55E00", "#CC79A7", "#0072B2", "#009E73"), strict=True))
OTHER = "#666666"
MARKERS = "osD^vPX<>ph*d8H"
# Losses below 0 and gains above it, centred at white, told apart with colour blindness.
DIVERGING = "RdBu"
SETTINGS = {
    "svg.hashsalt": "ballast",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "text.parse_math": False,
    "axes.unicode_minus": True,
}
METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


@contextmanager
def style() -> Iterator[None]:
    """Ballast's settings and nobody else's; text is never read as mathematics."""
    with (
        matplotlib.style.context("default"),
        mpl.rc_context(SETTINGS),
        warnings.catch_warnings(),
    ):
        # A letter that the font lacks is drawn as a box; the tables have the name.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, drawn without pyplot; to be called inside `style`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, folder: Path, name: str, kinds: Sequence[str]) -> list[Path]:
    """Write NAME.KIND for each kind (svg, pdf, png), atomically and without dates."""
    written = []
    with style():
        if figure.get_layout_engine() is not None:
            # Once, not for every kind again.
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
        for kind in kinds:
            written.append(folder / f"{name}.{kind}")
            with replacing(written[-1]) as temporary:
                figure.savefig(temporary, format=kind, dpi=150, metadata=METADATA[kind])
    return written


def colour_of(family: Any) -> str:
    """A family's colour; grey for what has none."""
    return OTHER if family is None or pd.isna(family) else COLOURS.get(family, OTHER)


def markers_of(table: pd.DataFrame) -> dict[str, str]:
    """A marker for each method of a table, the same in every figure of it; repeated if a family has
    more than there are."""
    found = {}
    for family in [*FAMILIES, None]:
        chosen = ~table["family"].isin(FAMILIES) if family is None else table["family"] == family
        for at, method in enumerate(sorted(set(table.loc[chosen, "method"].dropna()))):
            found[method] = MARKERS[at % len(MARKERS)]
    return found


def marker_size(rank: Any) -> float:
    """Diameter of a marker in points: grows by one with each doubling of the rank."""
    none = rank is None or pd.isna(rank)
    return 7.0 if none else min(13.0, 4.5 + 0.9 * math.log2(rank + 1))


def label_of(row: Mapping[str, Any], longest: int = 24, rank: bool = True) -> str:
    """Name of a row for a figure: method, rank and variant, long parts cut."""
    text = shorten(one_line(str(row["name"])), longest)
    text += "" if not rank or row["rank"] is None else f" r{int(row['rank'])}"
    variant = f" +{shorten(one_line(row['variant']), longest - 4)}" if row["variant"] else ""
    return text + variant


def families_of(families: Sequence[Any]) -> list[Line2D]:
    """Entries of a key for the families that occur."""
    dots = {"linestyle": "none", "marker": "o"}
    found = [Line2D([], [], color=COLOURS[f], label=f, **dots) for f in COLOURS if f in families]
    others = any(f not in COLOURS for f in families)
    return [*found, Line2D([], [], color=OTHER, label="other", **dots)] if others else found
