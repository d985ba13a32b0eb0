"""A table as it is shown: cells of text that every format renders in its own way.

Numbers become text here, once; `render` turns the text into Markdown, LaTeX or a terminal's lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

DASH = "–"
# Superscripts and how each format writes them.
MARKS = {
    "better": ("↑", r"\uparrow"),
    "worse": ("↓", r"\downarrow"),
    "same": ("°", r"\circ"),
    "edge": ("‡", r"\ddagger"),
}


class Cell(NamedTuple):
    """text: a number, or words from anywhere (renderers escape them); small: what is set smaller
    after it (a spread); marks: keys of MARKS; strong: whether it stands out as among the best."""

    text: str = ""
    small: str = ""
    marks: tuple[str, ...] = ()
    strong: bool = False


class Column(NamedTuple):
    """header; group: a heading over several columns; align: left, right or center."""

    header: str
    group: str = ""
    align: str = "right"


@dataclass(frozen=True)
class Table:
    """A small table with one subject.

    name: of its files; title and about: its heading and one sentence on how to read it; rows: one
    Cell for each of the columns; rules: numbers of rows below which a line is drawn; raw: the exact
    numbers, for CSV; notes: what must be known to trust it, plain text.
    """

    name: str
    title: str
    about: str
    columns: tuple[Column, ...]
    rows: list[list[Cell]]
    raw: pd.DataFrame
    notes: tuple[str, ...] = ()
    rules: frozenset[int] = field(default_factory=frozenset)


def absent(value: Any) -> bool:
    """Whether there is no number."""
    return value is None or bool(pd.isna(value))


def number(value: Any, digits: int, signed: bool = False) -> str:
    """A number with fixed digits, thousands apart; a dash if there is none; no negative zero."""
    if absent(value):
        return DASH
    value = round(float(value), digits) + 0.0
    return f"{value:{'+' if signed and value else ''},.{digits}f}"


def figures(value: Any, digits: int = 3) -> str:
    """A number with so many significant digits; a dash if there is none."""
    return DASH if absent(value) else f"{float(f'{float(value):.{digits}g}'):g}"


def compact(value: Any) -> str:
    """A count in three digits: 950, 12.3k, 1.24M, 7.62G."""
    if absent(value):
        return DASH
    value = float(value)
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size * 0.9995:
            return f"{float(f'{value / size:.3g}'):g}{unit}"
    return f"{value:.0f}"


def interval(low: Any, high: Any, digits: int = 1) -> str:
    """ "[low, high]", or a dash where there is none."""
    if absent(low) or absent(high):
        return DASH
    return f"[{number(low, digits)}, {number(high, digits)}]"


def spread(value: Any, digits: int) -> str:
    """ "± sd", or nothing where there is none."""
    return "" if absent(value) else f"± {number(value, digits)}"


def p_value(value: Any) -> str:
    """A p value in three digits, without a zero before the point."""
    if absent(value):
        return DASH
    return "< .001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def ranks(row: Mapping[str, Any], quantity: str = "O") -> str:
    """Ranks that a row may hold: "1", "2–4", or nothing where it has none."""
    low, high = row.get(f"{quantity}.rank_low"), row.get(f"{quantity}.rank_high")
    if absent(low) or absent(high):
        return ""
    return f"{low:.0f}" if low == high else f"{low:.0f}–{high:.0f}"


def share(value: Any) -> str:
    """A share from 0 to 1 in two digits."""
    return number(value, 2)
