"""Trade-off tables as Markdown, LaTeX, plain columns and a terminal's text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from textwrap import wrap
from typing import Any

import pandas as pd
from tabulate import tabulate

from ballast import escape
from ballast.escape import slug
from ballast.notes import row_name
from ballast.summary import Column, spans

__all__ = ["latex", "leaderboard", "markdown", "plain", "screen", "slug"]

Where = tuple[str, str]
HEAD = {"title": "Method", "rank": "Rank", "variant": "Variant"}
TAIL = {"learning_rate": "Learning rate", "seeds": "Seeds", "note": "Status"}


def number(value: Any, digits: int, signed: bool = False) -> str:
    """A number with fixed digits, thousands apart; a dash if there is none; no negative zero."""
    if value is None or pd.isna(value):
        return "–"
    value = round(float(value), digits) + 0.0
    return f"{value:{'+' if signed and value else ''},.{digits}f}"


def _spread(row: Mapping[str, Any], item: Column) -> str:
    sd = row[f"{item['key']} sd"]
    shown = item["ranked"] and sd is not None and not pd.isna(sd)
    return f" ± {number(sd, item['digits'])}" if shown else ""


def _columns(table: pd.DataFrame, which: int) -> list[Column]:
    return [item for item in table.attrs["columns"] if item["table"] == which]


def plain(table: pd.DataFrame) -> pd.DataFrame:
    """The table's raw numbers under readable names, for CSV: mean, sd and mark of each column."""
    found = {name: table[key] for key, name in HEAD.items()}
    found["Family"] = table["family"]
    for item in table.attrs["columns"]:
        name = item["header"]
        if name in found:
            name = f"{name} [{item['key']}]"
        found[name] = table[item["key"]].astype("float64")
        if item["ranked"]:
            found[f"{name} sd"] = table[f"{item['key']} sd"].astype("float64")
            found[f"{name} mark"] = table[f"{item['key']} mark"]
    found |= {name: table[key] for key, name in TAIL.items()}
    return pd.DataFrame(found)


def markdown(table: pd.DataFrame, heading: str = "#") -> str:
    """The trade-off table, its second table and the footnotes as Markdown."""
    base, target = escape.markdown(table.attrs["base"]), escape.markdown(table.attrs["target"])
    lines = [f"{heading} {base} tuned on {target}", "", _pipe(table, _columns(table, 1))]
    if _columns(table, 2):
        lines += ["", f"{heading}# Losses and probes (never averaged with points)", ""]
        lines += [_pipe(table, _columns(table, 2), costs=False)]
    lines += ["", *(f"* {escape.markdown(note)}" for note in table.attrs["footnotes"])]
    return "\n".join(lines) + "\n"


def _pipe(table: pd.DataFrame, columns: list[Column], costs: bool = True) -> str:
    tail = TAIL if costs else {"seeds": "Seeds"}
    headers = [*HEAD.values(), *(escape.markdown(c["header"]) for c in columns), *tail.values()]
    rows = []
    for row in table.to_dict("records"):
        cells = [escape.markdown(row["title"]), _rank(row), escape.markdown(row["variant"])]
        cells += [_marked_md(row, item) for item in columns]
        rows.append([*cells, *(escape.markdown(row[key]) for key in tail)])
    align = ["left", "right", "left"] + ["right"] * len(columns) + ["right", "center", "left"]
    align = align[: len(headers)]
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def _rank(row: Mapping[str, Any]) -> str:
    return "" if pd.isna(row["rank"]) else str(int(row["rank"]))


def _marked_md(row: Mapping[str, Any], item: Column) -> str:
    text = number(row[item["key"]], item["digits"], item["signed"])
    around = {"best": "**", "second": "_"}.get(row[f"{item['key']} mark"], "")
    return f"{around}{text}{around}{_spread(row, item)}"


def latex(table: pd.DataFrame) -> str:
    """The same in LaTeX; needs the packages booktabs and graphicx."""
    base, target = escape.latex(table.attrs["base"]), escape.latex(table.attrs["target"])
    caption = f"{base} tuned on {target}: specialization against stability."
    label = slug(f"tab-tradeoff-{table.attrs['base']}-{table.attrs['target']}")
    lines = [
        r"% needs \usepackage{booktabs,graphicx} and, with pdflatex, \usepackage[T1]{fontenc}",
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{{label}}}",
        *_tabular(table, _columns(table, 1), TAIL),
    ]
    if _columns(table, 2):
        lines += [r"\par\medskip", *_tabular(table, _columns(table, 2), {"seeds": "Seeds"})]
    lines += [r"\par\smallskip", r"\begin{minipage}{\textwidth}\footnotesize\raggedright"]
    lines += [rf"{escape.latex(note)}\par" for note in table.attrs["footnotes"]]
    return "\n".join([*lines, r"\end{minipage}", r"\end{table*}"]) + "\n"


def _tabular(table: pd.DataFrame, columns: list[Column], tail: dict[str, str]) -> list[str]:
    spec = "lrl" + "r" * len(columns) + {3: "rcl", 1: "c"}[len(tail)]
    groups, rules, at = [], [], len(HEAD) + 1
    for name, items in groupby(columns, key=lambda item: item["group"]):
        width = len(list(items))
        groups.append(rf"\multicolumn{{{width}}}{{c}}{{{escape.latex(name)}}}")
        rules.append(rf"\cmidrule(lr){{{at}-{at + width - 1}}}")
        at += width
    headers = [*HEAD.values(), *(c["header"] for c in columns), *tail.values()]
    lines = [
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{{spec}}}",
        r"\toprule",
        " & ".join(["", "", "", *groups, *([""] * len(tail))]) + r" \\",
        "".join(rules),
        " & ".join(escape.latex(name) for name in headers) + r" \\",
        r"\midrule",
    ]
    for at, row in enumerate(table.to_dict("records")):
        cells = [escape.latex(row["title"]), _rank(row), escape.latex(row["variant"])]
        cells += [_marked_tex(row, item) for item in columns]
        cells += [escape.latex(row[key]) for key in tail]
        lines.append(" & ".join(cells) + r" \\" + (r" \midrule" if at == 0 else ""))
    return [*lines, r"\bottomrule", r"\end{tabular}}"]


def _marked_tex(row: Mapping[str, Any], item: Column) -> str:
    text = number(row[item["key"]], item["digits"], item["signed"])
    text = escape.latex(text).replace("{-}", "$-$").replace("–", "--")
    command = {"best": r"\textbf", "second": r"\underline"}.get(row[f"{item['key']} mark"])
    text = rf"{command}{{{text}}}" if command else text
    sd = _spread(row, item)
    return text + (rf" {{\scriptsize {escape.latex(sd)}}}" if sd else "")


# The leaderboard: every base and target, ranked by O, short enough for a screen.

BOARD = (
    ("source_mean", "Source", 1, False, False),
    ("F", "F", 1, True, True),
    ("target_mean", "Target", 1, False, False),
    ("E", "E", 1, True, True),
    ("O", "O", 1, True, True),
)


def _board(table: pd.DataFrame, name: Callable[[Any], str]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows ranked by O; rows without a cell that is ok come last."""
    base, rows = table.iloc[0].to_dict(), table.iloc[1:].to_dict("records")
    ranks = spans(
        *([row[key] for row in rows] for key in ("O", "O sd")), [row["n_ok"] for row in rows]
    )
    order = sorted(range(len(rows)), key=lambda i: (-_or(rows[i]["O"], -math.inf), i))
    body = [[ranks[i], *_board_row(rows[i], name)] for i in order]
    headers = ["#", "method", "rank", *(item[1] for item in BOARD), "params", "train s", "seeds"]
    return headers, [["", *_board_row(base, name)], *body]


def _or(value: Any, other: float) -> float:
    return other if value is None or pd.isna(value) else float(value)


def _board_row(row: dict[str, Any], name: Callable[[Any], str]) -> list[str]:
    cells = [name(row), _rank(row)]
    for key, _, digits, signed, spread in BOARD:
        text, sd = number(row[key], digits, signed), row[f"{key} sd"]
        shown = spread and sd is not None and not pd.isna(sd)
        cells.append(f"{text} ±{number(sd, digits)}" if shown else text)
    short = compact(row["trainable_parameters"])
    return [*cells, short, number(row["seconds.train"], 1), row["seeds"]]


def compact(value: Any) -> str:
    """A count in three digits: 950, 12.3k, 1.24M, 7.62G."""
    if value is None or pd.isna(value):
        return "–"
    value = float(value)
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size * 0.9995:
            return f"{float(f'{value / size:.3g}'):g}{unit}"
    return f"{value:.0f}"


def counts(table: pd.DataFrame) -> str:
    """How the cells stand, in one line."""
    found = table["status"].value_counts()
    words = {"ok": "done", "failed": "failed", "missing": "missing", "stale": "stale"}
    words |= {"rescore": "to be scored again", "unplanned": "no longer planned"}
    parts = [
        f"{found.get(key, 0)} {word}"
        for key, word in words.items()
        if key in ("ok", "failed", "missing", "stale") or found.get(key, 0)
    ]
    return f"{len(table)} cells: {', '.join(parts)}"


RULE = (
    "Ranked by O = E + F (points, mean ± sd over seeds). Rows that the noise over seeds cannot "
    "tell apart share a range of ranks; one seed has no rank."
)


def _bad_rows(table: pd.DataFrame) -> list[str]:
    rows = table.iloc[1:].to_dict("records")
    return [f"{row_name(row)}: {row['note']}" for row in rows if row["note"]]


def leaderboard(
    tidy: pd.DataFrame, tables: dict[Where, pd.DataFrame], names: dict[Where, str]
) -> str:
    """Every base and target as Markdown, with links to the full tables."""
    lines = ["# Leaderboard", "", counts(tidy) + ".", "", RULE]
    for where, table in tables.items():
        base, target = map(escape.markdown, where)
        headers, rows = _board(table, lambda row: escape.markdown(_method(row)))
        align = ["center", "left"] + ["right"] * (len(headers) - 3) + ["center"]
        lines += ["", f"## {base} tuned on {target}", ""]
        lines += [tabulate(rows, headers, "pipe", disable_numparse=True, colalign=align), ""]
        lines += [f"* {escape.markdown(note)}" for note in _bad_rows(table)]
        lines += [f"* Full table: [{names[where]}.md]({names[where]}.md)"]
    return "\n".join(lines) + "\n"


def _method(row: Mapping[str, Any]) -> str:
    return f"{row['title']} +{row['variant']}" if row["variant"] else str(row["title"])


WIDTH = 110
MOST_NOTES = 12


def screen(tidy: pd.DataFrame, tables: dict[Where, pd.DataFrame], folder: Path | None) -> str:
    """The leaderboard as plain text, at most about 110 columns wide."""
    lines = []
    for (base, target), table in tables.items():
        headers, rows = _board(table, lambda row: escape.shorten(escape.one_line(_method(row)), 24))
        bad = [escape.shorten(f"  {escape.one_line(note)}", WIDTH) for note in _bad_rows(table)]
        more = len(bad) - MOST_NOTES
        bad = (
            [*bad[:MOST_NOTES], f"  and {more} more rows with cells that are not ok"]
            if more > 0
            else bad
        )
        lines += [escape.one_line(f"{base} tuned on {target}"), *_aligned(headers, rows), *bad, ""]
    lines += [*wrap(RULE, WIDTH), counts(tidy)]
    lines += [f"Tables and plots: {folder}"] if folder else []
    return "\n".join(lines) + "\n"


def _aligned(headers: list[str], rows: list[list[str]]) -> list[str]:
    """Columns two blanks apart, the method's to the left and the others to the right."""
    lines = [headers, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headers))]
    texts = [
        "  ".join(f"{cell:{'<' if i == 1 else '>'}{widths[i]}}" for i, cell in enumerate(line))
        for line in lines
    ]
    texts.insert(1, "  ".join("─" * width for width in widths))
    return [text.rstrip() for text in texts]
