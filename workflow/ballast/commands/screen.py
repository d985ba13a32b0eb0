"""How commands write: plain text for people, finite JSON for programs.

Text of records is never markup, and lines hold without colour or drawn boxes, so that a screen
reader or a pipe gets the same words as a terminal.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import Any

from rich.cells import cell_len, set_cell_size

from ballast.escape import one_line
from ballast.tables.printed import DASH, absent, number

NARROW, WIDE = 80, 110
LEAST, COMFORTABLE = 8, 24  # columns for a name


def width() -> int:
    """Columns to fill: the terminal's, within 80 and 110."""
    return min(max(shutil.get_terminal_size((WIDE, 24)).columns, NARROW), WIDE)


def _needed(lines: Sequence[Sequence[str]]) -> int:
    """Width of a table whose first column may be cut to COMFORTABLE."""
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    return min(widths[0], COMFORTABLE) + sum(widths[1:]) + 2 * len(widths) - 2


def _fitted(text: str, width: int, left: bool) -> str:
    """The text in exactly so many columns of a terminal; some characters take two."""
    if cell_len(text) > width:
        return set_cell_size(text, width - 1) + "…"
    return text + " " * (width - cell_len(text)) if left else " " * (width - cell_len(text)) + text


class Screen:
    """Lines, headings and tables on standard output."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(
            file=sys.stdout, width=width(), markup=False, highlight=False, emoji=False
        )

    def line(self, text: str = "", indent: int = 0, style: str = "") -> None:
        """A paragraph, wrapped at blanks; style only where there is a terminal."""
        pad = " " * indent
        lines = wrap(one_line(text), self._console.width, initial_indent=pad, subsequent_indent=pad)
        for part in lines or [""]:
            self._console.print(part, style=style or None, soft_wrap=True)

    def heading(self, text: str) -> None:
        """A line of its own with a blank one before it."""
        self.line()
        self.line(text, style="bold")

    def table(
        self,
        headers: Sequence[str],
        rows: Iterable[Sequence[Any]],
        left: int = 1,
        spare: Sequence[str] = (),
    ) -> None:
        """Columns two blanks apart; the first `left` begin at the left side, the others end right.

        Where there is too little room, the columns `spare` are left out one by one, and then the
        first column is cut; numbers never are.
        """
        lines = [[one_line(str(cell)) for cell in row] for row in (headers, *rows)]
        dropped = list(spare)
        while dropped and _needed(lines) > self._console.width:
            at = lines[0].index(dropped.pop(0))
            lines = [[*line[:at], *line[at + 1 :]] for line in lines]
        widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
        room = self._console.width - sum(widths[1:]) - 2 * (len(widths) - 1)
        widths[0] = min(widths[0], max(LEAST, room))
        for row, line in enumerate(lines):
            cells = [_fitted(cell, widths[i], i < left) for i, cell in enumerate(line)]
            text = "  ".join(cells).rstrip()
            self._console.print(text, style="bold" if row == 0 else None, soft_wrap=True)

    def facts(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Names and values, one to a line; long values are wrapped under themselves."""
        found = [(name, value) for name, value in pairs if value]
        longest = max((len(name) for name, _ in found), default=0)
        for name, value in found:
            first = f"  {name:<{longest}}  "
            rest = " " * len(first)
            for part in wrap(one_line(value), self._console.width, initial_indent=first,
                             subsequent_indent=rest, break_on_hyphens=False):  # fmt: skip
                self._console.print(part, soft_wrap=True)


def finite(value: Any) -> Any:
    """The value as JSON can hold it: what is missing, NaN or infinite is null."""
    if isinstance(value, dict):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else _other(value)


def _other(value: Any) -> Any:
    import pandas as pd

    return None if value is pd.NA or value is pd.NaT else str(value)


def print_json(value: Any) -> None:
    """Print a value as JSON, numbers finite."""
    print(json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False))


def interval(low: Any, high: Any, digits: int = 1, signed: bool = False) -> str:
    """Both ends of an interval, or a dash."""
    if absent(low) or absent(high):
        return DASH
    return f"{number(low, digits, signed)} to {number(high, digits, signed)}"


def count(n: int, noun: str, plural: str = "") -> str:
    """A number and its noun: 1 seed, 3 seeds."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"
