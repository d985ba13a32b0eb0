"""What the leaderboard's page knows: one JSON of columns, for every base and target.

Text columns are {"v": distinct values, "i": index of each}; numbers are rounded to what they mean,
null where there is none. A row is a method x rank x variant; `row` of a cell points to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from ballast.results import Results
from ballast.site import extras
from ballast.site.quantities import Quantity, quantities, rounded
from ballast.statistics.analysis import COMPARED, Analysis
from ballast.statistics.rows import row_keys
from ballast.tables.summary import task_facts

Analyses = Mapping[tuple[str, str], Analysis]
KEY = ["method", "variant", "rank"]
CHURN = ("n", "kept", "gained", "forgotten", "never", "forgotten_form", "forgotten_likely")
ROW_TEXT = ("key", "method", "title", "family", "variant", "note")
CELL_TEXT = ("id", "status", "reason", "origin", "scored", "learning_rate_source")
SPREAD = ("low", "high")
COMPARISONS = ("diff", "diff_low", "diff_high", "p_adjusted", "p_base_adjusted")


def page_data(
    results: Results, analyses: Analyses, pages: Mapping[str, str], protocol: str | None = None
) -> dict[str, Any]:
    """Everything that index.html shows; pages: link to each cell's page, by cell."""
    table = results.table
    titles = _titles(table)
    places, known = [], {}
    for base, target in results.places():
        cells = table[(table["base"] == base) & (table["target"] == target)]
        cells = cells[cells["status"] != "unplanned"]
        analysis = analyses.get((base, target))
        if analysis is None or cells.empty:
            continue
        place, used = _place(results, cells, analysis, titles, pages)
        places.append(place)
        known |= used
    return {
        "version": 1,
        "suite": results.suite,
        "quantities": {key: known[key].as_json() for key in quantities(known, titles)},
        "methods": _methods(table),
        "places": places,
        "problems": list(results.problems),
        "published": extras.published(results, analyses, protocol),
    }


def _titles(table: pd.DataFrame) -> dict[str, str]:
    """Titles of the tasks, by name; a name stands for itself where a record gives none."""
    found: dict[str, str] = {}
    for text in table["tasks"].dropna().drop_duplicates():
        for name, facts in json.loads(text).items():
            found.setdefault(name, facts.get("title") or name)
    return found


def _methods(table: pd.DataFrame) -> dict[str, Any]:
    from ballast.site.citations import citations  # reads the method files, once

    declared = citations()
    found = {}
    for method, title, family in (
        table[["method", "title", "family"]].drop_duplicates("method").itertuples(index=False)
    ):
        entry = declared(str(method), str(title))
        found[str(method)] = {"title": str(title), "family": _text(family)} | entry
    return dict(sorted(found.items()))


def _place(
    results: Results,
    cells: pd.DataFrame,
    analysis: Analysis,
    titles: dict[str, str],
    pages: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, Quantity]]:
    tasks = task_facts(cells)
    cells = cells.copy()
    upstream = [f"dce.{k}" for k, v in tasks.items() if v["role"] == "upstream"]
    upstream = [key for key in upstream if key in cells and cells[key].notna().any()]
    if upstream:
        cells["dce.upstream"] = cells[upstream].mean(axis=1, skipna=False)
    rows, at = _join(cells, analysis.rows)
    rows = _with_means(rows, cells, at)
    rows, equal = extras.with_equal(results, analysis, rows)
    numbers = [c for c in cells if pd.api.types.is_numeric_dtype(cells[c]) and c not in KEY]
    known = quantities([c for c in numbers if c != "seed" and cells[c].notna().any()], titles)
    shown = known | quantities([c for c in ("front",) if c in rows], titles) | equal
    place = {
        "base": analysis.base,
        "target": analysis.target,
        "control": analysis.control,
        "notes": list(analysis.notes),
        "facts": _facts(analysis.facts),
        "tasks": [_task(name, facts, cells) for name, facts in tasks.items()],
        "before": _before(cells, tasks),
        "definitions": _definitions(analysis.definitions),
        "rows": _rows(rows, cells, at, shown),
        "cells": _cells(cells, at, known, pages),
        "churn": _churn(cells, at, len(rows), tasks),
        "curves": extras.points(results.curves, cells["id"], at),
        "losses": extras.losses(results.folder, cells["id"]),
        "rates": extras.rates(results.rates, analysis),
    }
    return place, shown


def _join(cells: pd.DataFrame, rows: pd.DataFrame) -> tuple[pd.DataFrame, list[int]]:
    """The rows with their key as a column, and the row's number of each cell."""
    number = {str(key): at for at, key in enumerate(rows.index)}
    at = [number[key] for key in row_keys(cells)]
    return rows.copy().assign(key=rows.index.astype(str)).reset_index(drop=True), at


def _with_means(rows: pd.DataFrame, cells: pd.DataFrame, at: list[int]) -> pd.DataFrame:
    """Means over the seeds that are ok of the numbers that the analysis has none of."""
    good = cells.assign(**{"": at})[(cells["status"] == "ok").to_numpy()]
    lacking = [
        name
        for name in good
        if name not in (*rows.columns, "", "seed") and pd.api.types.is_numeric_dtype(good[name])
    ]
    means = good.groupby("")[lacking].mean() if len(good) else pd.DataFrame(columns=lacking)
    means = means.astype("float64").reindex(range(len(rows)))
    return pd.concat([rows, means.set_index(rows.index)], axis=1)


def _rows(
    rows: pd.DataFrame, cells: pd.DataFrame, at: list[int], shown: dict[str, Quantity]
) -> dict[str, Any]:
    grouped = cells.assign(row=at).groupby("row")
    several = {
        "status": grouped["status"].agg(_distinct),
        "origin": grouped["origin"].agg(_distinct),
    }
    return {
        "n": len(rows),
        "rank": [None if pd.isna(v) else int(v) for v in rows["rank"]],
        "n_ok": rows["n_ok"].astype(int).tolist(),
        "n_planned": rows["n_planned"].astype(int).tolist(),
        "seeds": [" ".join(str(s) for s in seeds) for seeds in rows["seeds"]],
        "text": {name: coded(rows[name]) for name in ROW_TEXT if name in rows}
        | {k: coded(v.reindex(range(len(rows))).fillna("")) for k, v in several.items()},
        "mean": _block(rows, {key: (key, q.digits) for key, q in shown.items()}),
        **{
            end: _block(rows, {key: (f"{key}.{end}", q.digits) for key, q in shown.items()})
            for end in SPREAD
        },
        "ranks": _ranks(rows),
        "vs": {
            f"{q}.{name}": rounded(rows[f"{q}.{name}"], 4 if name.startswith("p_") else 2)
            for q in COMPARED
            for name in COMPARISONS
            if f"{q}.{name}" in rows
        },
    }


def _distinct(values: pd.Series) -> str:
    return " ".join(sorted(set(values.fillna(""))))


def _ranks(rows: pd.DataFrame) -> dict[str, Any]:
    """Lowest and highest rank that a row may hold, for each quantity that rows are ranked by."""
    return {
        q: [rounded(rows[f"{q}.rank_low"], 0), rounded(rows[f"{q}.rank_high"], 0)]
        for q in COMPARED
        if f"{q}.rank_low" in rows
    }


def _block(
    frame: pd.DataFrame, chosen: Mapping[str, tuple[str, int | None]]
) -> dict[str, list[float | None]]:
    """Columns of numbers by the name of their quantity; those without any number are left out."""
    return {
        name: rounded(frame[column].astype("float64"), digits)
        for name, (column, digits) in chosen.items()
        if column in frame and frame[column].notna().any()
    }


def _cells(
    cells: pd.DataFrame, at: list[int], known: dict[str, Quantity], pages: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "n": len(cells),
        "row": at,
        "seed": cells["seed"].astype(int).tolist(),
        "page": [pages.get(cell) for cell in cells["id"]],
        "text": {name: coded(cells[name]) for name in CELL_TEXT},
        "mean": _block(cells, {key: (key, q.digits) for key, q in known.items()}),
    }


def _task(name: str, facts: dict[str, Any], cells: pd.DataFrame) -> dict[str, Any]:
    base = cells[f"base.{name}"].dropna() if f"base.{name}" in cells else []
    kept = {k: facts.get(k) for k in ("title", "role", "metric", "unit", "direction", "n")}
    return {"name": name} | kept | {"base": rounded(base[:1], 3)[0] if len(base) else None}


def _before(cells: pd.DataFrame, tasks: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The untouched base: Source, Target and the score of every task."""
    found: dict[str, float | None] = {}
    scores = {k: cells[f"base.{k}"].mean() for k in tasks if f"base.{k}" in cells}
    for name, role in (("source_mean", "upstream"), ("target_mean", "target")):
        chosen = [
            v
            for k, v in scores.items()
            if tasks[k]["role"] == role and tasks[k]["unit"] == "points"
        ]
        found[name] = rounded([sum(chosen) / len(chosen)], 2)[0] if chosen else None
    found |= {f"score.{k}": rounded([v], 2)[0] for k, v in scores.items()}
    return {key: value for key, value in found.items() if value is not None}


def _churn(
    cells: pd.DataFrame, at: list[int], n: int, tasks: Iterable[str]
) -> dict[str, dict[str, list[int | None]]]:
    """Counts of items per task and kind, summed over the seeds of each row."""
    columns = [f"churn.{t}.{k}" for t in tasks for k in CHURN if f"churn.{t}.{k}" in cells]
    if not columns:
        return {}
    block = cells[columns].astype("float64").assign(row=at)
    sums = block.groupby("row").sum(min_count=1).reindex(range(n))
    found: dict[str, dict[str, list[int | None]]] = {}
    for column in columns:
        if sums[column].notna().any():
            task, _, kind = column.removeprefix("churn.").rpartition(".")
            found.setdefault(task, {})[kind] = rounded(sums[column], 0)
    return found


def _facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {k: rounded([v], 4)[0] for k, v in facts.items() if isinstance(v, int | float)}


def _definitions(table: pd.DataFrame) -> list[list[Any]]:
    """Kendall's tau between the orders that two definitions of "best" give: a, b, tau, n."""
    if table is None or table.empty:
        return []
    block = zip(
        table["a"].astype(str), table["b"].astype(str), rounded(table["tau"], 3),
        rounded(table["n"], 0), strict=True,
    )  # fmt: skip
    return [list(item) for item in block]


def _text(value: Any) -> str:
    return "" if pd.isna(value) else str(value)


def coded(values: Iterable[Any]) -> dict[str, list[Any]]:
    """Text as its distinct values in the order of their first use, and an index for each."""
    numbers: dict[str, int] = {}
    index = [numbers.setdefault(_text(value), len(numbers)) for value in values]
    return {"v": list(numbers), "i": index}
