"""The leaderboard: every base and target ranked by O, short enough for a screen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import pandas as pd

from ballast import escape
from ballast.results import Results
from ballast.tables import render
from ballast.tables.notes import row_name, smallest
from ballast.tables.printed import DASH, Cell, Column, Table, absent, compact, number, ranks, share
from ballast.tables.summary import Place

RULE = (
    "Ranked by O = E + F (points, mean ± sd over seeds). #: ranks that a row may hold by tests "
    "paired by seed and item, corrected for their number; rows that are not told apart share them. "
    "One seed has no rank. front: how often a row is on the front of E and F in bootstrap draws."
)
WIDTH = 110
LONGEST = 24
MOST_NOTES = 12


def board(place: Place, longest: int | None = None) -> Table:
    """Rows ranked by O, those without a cell that is ok last; names cut to `longest` letters."""
    rows = sorted(place.rows.values(), key=lambda r: math.inf if absent(r["O"]) else -r["O"])
    s, t = (Cell(number(place.base[key], 1)) for key in ("source_mean", "target_mean"))
    dash = Cell(DASH)
    body = [[Cell(), Cell("Zero-shot"), s, dash, t, *[dash] * 4, Cell()]]
    body += [[Cell(ranks(row)), Cell(_name(row, longest)), *_numbers(row)] for row in rows]
    columns = [Column("#", align="center"), Column("method", align="left")]
    columns += [Column(h) for h in ("Source", "F", "Target", "E", "O", "front", "params")]
    columns += [Column("seeds", align="center")]
    raw = place.analysis.rows.loc[[row["key"] for row in rows]]
    return Table("leaderboard", place.title, "", tuple(columns), body, raw)


def _name(row: Mapping[str, Any], longest: int | None) -> str:
    """Method, variant and rank in one piece; of a long name the rank stays."""
    rank = "" if row["rank"] is None else f" r{int(row['rank'])}"
    title = f"{row['name']} +{row['variant']}" if row["variant"] else str(row["name"])
    if longest is None:
        return title + rank
    return escape.shorten(escape.one_line(title), longest - len(rank)) + rank


def _numbers(row: Mapping[str, Any]) -> list[Cell]:
    return [
        Cell(number(row["source_mean"], 1)),
        _mean(row, "F"),
        Cell(number(row["target_mean"], 1)),
        _mean(row, "E"),
        _mean(row, "O"),
        Cell(share(row.get("front"))),
        Cell(compact(row.get("trainable_parameters"))),
        Cell(f"{row['n_ok']}/{row['n_planned']}"),
    ]


def _mean(row: Mapping[str, Any], key: str) -> Cell:
    sd = row.get(f"{key}.sd")
    return Cell(number(row[key], 1, signed=True), "" if absent(sd) else f"±{number(sd, 1)}")


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


def _bad_rows(place: Place) -> list[str]:
    return [f"{row_name(row)}: {row['note']}" for row in place.rows.values() if row["note"]]


def leaderboard(results: Results, places: Sequence[Place], pages: Sequence[str]) -> str:
    """Every base and target as Markdown, with links to the `pages` that have the full tables."""
    lines = ["# Leaderboard", "", counts(results.table) + ".", "", RULE]
    for place, page in zip(places, pages, strict=True):
        table = board(place)
        headers = [column.header for column in table.columns]
        lines += ["", f"## {escape.markdown(table.title)}", "", render.pipe(headers, table), ""]
        below = [*smallest(place), *_bad_rows(place)]
        lines += [f"* {escape.markdown(note)}" for note in below]
        lines += [f"* All tables: [{page}]({page})"]
    return "\n".join(lines) + "\n"


def screen(results: Results, places: Sequence[Place], folder: Path | None = None) -> str:
    """The leaderboard as plain text of at most 110 columns; `folder`: where the files are."""
    lines = []
    for place in places:
        table = board(place, LONGEST)
        bad = [escape.shorten(f"  {escape.one_line(note)}", WIDTH) for note in _bad_rows(place)]
        more = len(bad) - MOST_NOTES
        bad = bad[:MOST_NOTES] if more > 0 else bad
        bad += [f"  and {more} more rows with cells that are not ok"] if more > 0 else []
        lines += [escape.one_line(table.title), *_aligned(table), *bad]
        lines += [line for note in smallest(place) for line in wrap(note, WIDTH)] + [""]
    lines += [*wrap(RULE, WIDTH), counts(results.table)]
    if folder:
        lines += [f"To look at: {folder}/leaderboard/index.html. Tables and figures: {folder}"]
    return "\n".join(lines) + "\n"


def _aligned(table: Table) -> list[str]:
    """Columns two blanks apart, the method's to the left and the others to the right."""
    lines = [[column.header for column in table.columns]]
    lines += [[f"{c.text} {c.small}" if c.small else c.text for c in row] for row in table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    signs = ["<" if column.align == "left" else ">" for column in table.columns]
    texts = [
        "  ".join(
            f"{cell:{sign}{width}}" for cell, sign, width in zip(line, signs, widths, strict=True)
        )
        for line in lines
    ]
    texts.insert(1, "  ".join("─" * width for width in widths))
    return [text.rstrip() for text in texts]
