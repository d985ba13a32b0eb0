"""Tables as Markdown, LaTeX and CSV: every cell's text is escaped here, for each format."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import pandas as pd
from tabulate import tabulate

from ballast import escape
from ballast.escape import slug
from ballast.tables.printed import MARKS, Cell, Column, Table

# Rows of a LaTeX table that fill a page; what is longer goes on in the next float.
PAGE_ROWS = 42
PACKAGES = r"% needs \usepackage{booktabs,graphicx} and, with pdflatex, \usepackage[T1]{fontenc}"


def markdown(table: Table, heading: str = "##") -> str:
    """A table with its heading, what it says and its notes as Markdown."""
    lines = [f"{heading} {escape.markdown(table.title)}", ""]
    lines += [escape.markdown(table.about), ""] if table.about else []
    lines += [pipe(_headers(table), table), ""]
    lines += [f"* {escape.markdown(note)}" for note in table.notes]
    return "\n".join(lines).rstrip() + "\n"


def _headers(table: Table) -> list[str]:
    """Headers for a format without groups: one that stands twice is named with its group."""
    names = [column.header for column in table.columns]
    return [
        f"{c.header}, {c.group}" if c.group and names.count(c.header) > 1 else c.header
        for c in table.columns
    ]


def pipe(headers: Sequence[str], table: Table) -> str:
    """The rows as a Markdown table."""
    rows = [[_markdown_cell(cell) for cell in row] for row in table.rows]
    return tabulate(
        rows,
        [escape.markdown(name) for name in headers],
        tablefmt="pipe",
        disable_numparse=True,
        colalign=[column.align for column in table.columns] if rows else None,
    )


# Numbers and intervals stay readable in the file itself; no other text is left as it is.
_NUMERIC = re.compile(r"[-+–±\d., /\[\]]*")


def _markdown_cell(cell: Cell) -> str:
    text = cell.text if _NUMERIC.fullmatch(cell.text) else escape.markdown(cell.text)
    text = f"**{text}**" if cell.strong else text
    text += "".join(MARKS[mark][0] for mark in cell.marks)
    return f"{text} {escape.markdown(cell.small)}" if cell.small else text


def latex(table: Table, place: str) -> str:
    """A table as floats in LaTeX, at most PAGE_ROWS rows each; needs booktabs and graphicx.

    place: what the caption begins with, e.g. the base and target; the label is made of it.
    """
    starts = range(0, max(1, len(table.rows)), PAGE_ROWS)
    floats = []
    for part, start in enumerate(starts):
        last = start + PAGE_ROWS >= len(table.rows)
        floats += _float(table, place, part, start, table.notes if last else ())
    return "\n".join([PACKAGES, *floats]) + "\n"


def _float(table: Table, place: str, part: int, start: int, notes: Sequence[str]) -> list[str]:
    caption = f"{place}: {table.title[:1].lower() + table.title[1:]}"
    caption = f"{caption} (continued)." if part else f"{caption}. {table.about}"
    lines = [r"\begin{table*}[tp]", r"\centering"]
    lines += [r"\addtocounter{table}{-1}"] if part else []
    lines += [rf"\caption{{{escape.latex(caption)}}}"]
    lines += [] if part else [rf"\label{{{slug(f'tab-{table.name}-{place}')}}}"]
    lines += _tabular(table, start)
    if notes:
        lines += [r"\par\smallskip", r"\begin{minipage}{\textwidth}\footnotesize\raggedright"]
        lines += [rf"{escape.latex(note)}\par" for note in notes] + [r"\end{minipage}"]
    return [*lines, r"\end{table*}"]


# A table as wide as the text or as narrow as it is.
_SCALED = r"\resizebox{\ifdim\width>\textwidth\textwidth\else\width\fi}{!}{%"


def _tabular(table: Table, start: int) -> list[str]:
    spec = "".join(column.align[0] for column in table.columns)
    lines = [_SCALED, rf"\begin{{tabular}}{{{spec}}}", r"\toprule", *_groups(table.columns)]
    lines += [" & ".join(escape.latex(c.header) for c in table.columns) + r" \\", r"\midrule"]
    end = min(start + PAGE_ROWS, len(table.rows))
    for at in range(start, end):
        rule = r" \midrule" if at in table.rules and at < end - 1 else ""
        lines.append(" & ".join(map(_latex_cell, table.rows[at])) + r" \\" + rule)
    return [*lines, r"\bottomrule", r"\end{tabular}}"]


def _groups(columns: Sequence[Column]) -> list[str]:
    """The line of headings over several columns, with a rule below each; nothing without any."""
    if not any(column.group for column in columns):
        return []
    cells, rules, at = [], [], 1
    for name, members in groupby(columns, key=lambda column: column.group):
        width = len(list(members))
        cells.append(rf"\multicolumn{{{width}}}{{c}}{{{escape.latex(name)}}}")
        rules += [rf"\cmidrule(lr){{{at}-{at + width - 1}}}"] if name else []
        at += width
    return [" & ".join(cells) + r" \\", "".join(rules)]


def _latex_cell(cell: Cell) -> str:
    text = _minus(cell.text)
    text = rf"\textbf{{{text}}}" if cell.strong else text
    text += "".join(f"$^{{{MARKS[mark][1]}}}$" for mark in cell.marks)
    return rf"{text} {{\scriptsize {_minus(cell.small)}}}" if cell.small else text


def _minus(text: str) -> str:
    """Escaped text; in numbers and intervals a hyphen is a minus sign."""
    escaped = escape.latex(text)
    return escaped.replace("{-}", "$-$") if _NUMERIC.fullmatch(text) else escaped


def document(paths: Sequence[str]) -> str:
    """A LaTeX document that shows every table, each from its own file."""
    lines = [
        r"\documentclass[a4paper,10pt]{article}",
        r"\usepackage[T1]{fontenc}",
        r"\usepackage[margin=18mm]{geometry}",
        r"\usepackage{booktabs,graphicx}",
        r"\begin{document}",
        *(rf"\input{{{path}}}\clearpage" for path in paths),
        *([] if paths else ["No tables yet."]),
        r"\end{document}",
    ]
    return "\n".join(lines) + "\n"


def to_csv(table: pd.DataFrame) -> str:
    """CSV without index: blanks for what is not there, floats with ten digits, text that no
    spreadsheet takes for a formula (an apostrophe is put before =, +, -, @, tab and return)."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([_csv_cell(str(name)) for name in table.columns])
    plain = table.astype(object).where(table.notna(), None)
    for row in plain.itertuples(index=False, name=None):
        writer.writerow([_csv_cell(value) for value in row])
    return stream.getvalue()


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        value = "".join(c if c.isprintable() or c in "\t\r\n" else " " for c in value)
        return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
    return f"{value + 0.0:.10g}" if isinstance(value, float) else str(value)
