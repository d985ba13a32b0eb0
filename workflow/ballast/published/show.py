"""A side-by-side table as Markdown, LaTeX and plain columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from tabulate import tabulate

from ballast import escape
from ballast.published.comparison import SideBySide
from ballast.published.ours import blocks_of
from ballast.results import Results
from ballast.statistics.analysis import Analysis

HEADERS = (
    "Method", "Rank", "Our rank", "Published", "Ours", "Difference", "Place", "Our place",
    "Same order?", "Differs in",
)  # fmt: skip
_ALIGN = ("left", *["right"] * 5, "right", "right", "center", "left")


def tables_of(
    results: Results,
    protocol: str | None = None,
    analyses: Mapping[tuple[str, str], Analysis] | None = None,
) -> list[pd.DataFrame]:
    """The tables of `ours.blocks_of`, ready to be shown: numbers and text under headers.

    attrs: title, notes (sentences), place (base, target) and key, a slug for file names.
    """
    return [frame(item) for item in blocks_of(results, protocol, analyses)]


def frame(item: SideBySide) -> pd.DataFrame:
    """A block under readable headers, places within our noise as text ("2-4")."""
    table = item.table
    found = pd.DataFrame(
        {
            "Quantity": table["quantity"],
            "Ours is": table["our_quantity"],
            "Method": table["method"],
            "Label": table["label"],
            "Variant": table["our_variant"],
            "Rank": table["rank"],
            "Our rank": table["our_rank"],
            "Published": table["published"],
            "Published ±": table["spread"],
            "Ours": table["ours"],
            "Ours ±": table["sd"],
            "Difference": table["difference"],
            "Place": table["place"],
            "Our place": [_place(row, "-") for row in table.to_dict("records")],
            "Same order?": table["same_order"],
            "Differs in": table["differs_in"],
        }
    )
    parts = (item.protocol, item.source, item.model, item.trained_on, item.base, item.target)
    key = escape.slug("-".join(part for part in parts if part))
    place = (item.base, item.target)
    found.attrs = {"title": _title(item), "notes": list(item.notes), "key": key, "place": place}
    return found


def plain(item: SideBySide) -> pd.DataFrame:
    """The numbers for CSV, with what the block is in the first columns."""
    table = item.table.copy()
    for name in ("trained_on", "model", "source", "target", "base", "protocol"):
        table.insert(0, name, getattr(item, name))
    return table


def markdown(item: SideBySide, heading: str = "#") -> str:
    """One pipe table per quantity, and the notes."""
    lines = [f"{heading} {escape.markdown(_title(item))}", ""]
    for name, part in item.table.groupby("quantity", sort=False):
        rows = [[escape.markdown(cell) for cell in _cells(r)] for r in part.to_dict("records")]
        ours = part["our_quantity"].iloc[0]
        lines += [f"{heading}# {escape.markdown(f'{name} | ours: {ours}')}", ""]
        lines += [
            tabulate(rows, HEADERS, tablefmt="pipe", disable_numparse=True, colalign=_ALIGN), ""
        ]  # fmt: skip
    return "\n".join([*lines, *(f"* {escape.markdown(note)}" for note in item.notes)]) + "\n"


def latex(item: SideBySide) -> str:
    """One float with a part per quantity; needs the packages booktabs and graphicx."""
    label = escape.slug(f"tab-{item.protocol}-{item.source}-{item.base}-{item.target}")
    lines = [
        r"% needs \usepackage{booktabs,graphicx} and, with pdflatex, \usepackage[T1]{fontenc}",
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{escape.latex(_title(item))}}}",
        rf"\label{{{label}}}",
        r"\resizebox{\textwidth}{!}{%",
        r"\begin{tabular}{lrrrrrrrcl}",
        r"\toprule",
        " & ".join(escape.latex(name) for name in HEADERS) + r" \\",
    ]
    for name, part in item.table.groupby("quantity", sort=False):
        head = f"{name} | ours: {part['our_quantity'].iloc[0]}"
        lines += [r"\midrule", rf"\multicolumn{{10}}{{l}}{{{escape.latex(head)}}} \\"]
        for row in part.to_dict("records"):
            lines.append(" & ".join(escape.latex(cell) for cell in _cells(row)) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}", r"\par\smallskip"]
    lines += [r"\begin{minipage}{\textwidth}\footnotesize\raggedright"]
    lines += [rf"{escape.latex(note)}\par" for note in item.notes]
    return "\n".join([*lines, r"\end{minipage}", r"\end{table*}"]) + "\n"


def _title(item: SideBySide) -> str:
    theirs = ", ".join(part for part in (item.model, item.trained_on) if part)
    return f"{item.title} ({theirs or 'model not known'}) and {item.base} tuned on {item.target}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    variant = f" +{row['our_variant']}" if row["our_variant"] else ""
    return [
        f"{row['label']} | {row['method']}{variant}",
        _count(row["rank"]),
        _count(row["our_rank"]),
        _number(row["published"], row["spread"]),
        _number(row["ours"], row["sd"]),
        "–" if pd.isna(row["difference"]) else f"{row['difference']:+.2f}",
        _count(row["place"]),
        _place(row, "–"),
        row["same_order"],
        row["differs_in"],
    ]


def _place(row: Mapping[str, Any], dash: str) -> str:
    low, high = row["our_place_low"], row["our_place_high"]
    text = _count(row["our_place"])
    return text if pd.isna(low) or low == high else f"{text} ({_count(low)}{dash}{_count(high)})"


def _count(value: Any) -> str:
    return "–" if pd.isna(value) else str(int(value))


def _number(value: float, spread: float) -> str:
    digits = 4 if abs(value) < 1 and value != 0 else 2
    text = f"{value:.{digits}f}"
    return text if pd.isna(spread) else f"{text} ± {spread:.2f}"
