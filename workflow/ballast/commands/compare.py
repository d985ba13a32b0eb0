"""`ballast compare`: two rows, or two cells, and whether they differ by more than the noise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

from ballast.commands.screen import Screen, count, interval
from ballast.commands.source import Named, at_place, chosen_places, find
from ballast.errors import DataError
from ballast.results import Results
from ballast.statistics.analysis import LEVEL
from ballast.statistics.compare import Comparison, compare
from ballast.statistics.rows import row_keys
from ballast.tables.notes import row_name
from ballast.tables.printed import absent, number, p_value

NUMBERS = (
    "value_a",
    "value_b",
    "difference",
    "low",
    "high",
    "p",
    "won",
    "lost",
    "n_items",
    "n_seeds",
)


def compare_all(
    results: Results, a: str, b: str, base: str | None = None, target: str | None = None
) -> dict[str, Any]:
    """Compare what two names stand for wherever both are; in points, a − b.

    A row and a cell are compared as rows. Raises DataError for names that nothing or several fit,
    for two bases or targets, for twice the same, and where one of them has no result.
    """
    named = [find(results, text) for text in (a, b)]
    if len(named[0]) == len(named[1]) == 1:
        _same_place(named[0][0], named[1][0])
    places = sorted({n.place for n in named[0]} & {n.place for n in named[1]})
    if not places:
        raise DataError(f"{a} and {b} were run on no base and target in common")
    found = []
    for place in chosen_places(places, base, target):
        pair = [next(n for n in names if n.place == place) for names in named]
        found.append(_compare(results, *pair))
    return {
        "format": 1,
        "command": "compare",
        "suite": results.suite,
        "level": LEVEL,
        "comparisons": found,
    }


def _same_place(a: Named, b: Named) -> None:
    for what in ("base", "target"):
        one, other = getattr(a, what), getattr(b, what)
        if one != other:
            raise DataError(
                f"{a.name} and {b.name}: {what}s {one} and {other}; only results of one base and "
                "target can be compared"
            )


def _compare(results: Results, a: Named, b: Named) -> dict[str, Any]:
    both_cells = a.cell is not None and b.cell is not None
    names = (a.name, b.name) if both_cells else (a.key, b.key)
    if names[0] == names[1]:
        raise DataError(f"{names[0]}: compared with itself; name two rows, or two cells")
    here = at_place(results, a.place)
    for name in names:
        _check_result(here.table, name, both_cells)
    comparison = compare(here, *names)[0]
    sides = [_side(here.table, name, both_cells) for name in names]
    facts = _tasks(here.table)
    lines = [_line(row, facts, comparison) for row in comparison.table.to_dict("records")]
    found = {
        "base": a.base, "target": a.target, "kind": comparison.kind, "a": sides[0], "b": sides[1],
        "quantities": lines,
    }  # fmt: skip
    return found | {"verdict": _verdict(found)}


def _check_result(table: pd.DataFrame, name: str, cell: bool) -> None:
    mine = _of(table, name, cell)
    if not (mine["status"] == "ok").any():
        why = "; ".join(
            f"{s}: {r}" for s, r in zip(mine["status"], mine["reason"].fillna(""), strict=True)
        )
        raise DataError(f"{name}: no result to compare ({why[:200]})")


def _of(table: pd.DataFrame, name: str, cell: bool) -> pd.DataFrame:
    keys = pd.Series(row_keys(table), table.index)
    return table[(table["id"] if cell else keys) == name]


def _side(table: pd.DataFrame, name: str, cell: bool) -> dict[str, Any]:
    mine = _of(table, name, cell)
    good = mine[mine["status"] == "ok"]
    first = mine.iloc[0]
    label = row_name(first)
    return {
        "key": row_keys(mine)[0],
        "cell": name if cell else None,
        "name": f"{label}, seed {first['seed']}" if cell else label,
        "method": first["method"],
        "title": first["title"],
        "variant": first["variant"],
        "rank": first["rank"],
        "seeds": sorted(int(seed) for seed in good["seed"]),
        "cells": list(good["id"]),
    }


def _tasks(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in table["tasks"].dropna().drop_duplicates():
        found = json.loads(text) | found
    return found


def _line(row: Mapping[str, Any], facts: Mapping[str, Any], made: Comparison) -> dict[str, Any]:
    name = row["quantity"]
    task = facts.get(name) if row["role"] != "measure" else None
    apart = None if absent(row["p"]) else bool(row["p"] < 1 - LEVEL)
    return {
        "quantity": name,
        "title": task["title"] if task else name,
        "role": row["role"],
        "unit": "points",
        **{key: row[key] for key in NUMBERS},
        "test": row["test"],
        "told_apart": apart,
    }


_VERBS = {
    "E": ("learns {} more", "learns {} less"),
    "F": ("forgets {} less", "forgets {} more"),
    "O": ("is ahead by {} in O", "is behind by {} in O"),
}


def _verdict(found: Mapping[str, Any]) -> str:
    """What the tests say of F, E and O, in words."""
    a, b = found["a"]["name"], found["b"]["name"]
    lines = {line["quantity"]: line for line in found["quantities"] if line["role"] == "measure"}
    known = [lines[name] for name in ("F", "E", "O") if name in lines]
    known = [line for line in known if not absent(line["difference"])]
    told = [_told(line) for line in known if line["told_apart"]]
    same = sorted(line["quantity"] for line in known if line["told_apart"] is False)
    open_ = sorted(line["quantity"] for line in known if line["told_apart"] is None)
    parts = [f"{a} {_and(told)} than {b}"] if told else []
    if same:
        parts.append(f"{_and(same)} cannot be told apart")
    if open_:
        why = "one seed in common" if found["kind"] == "rows" else "the items are not known"
        parts.append(f"of {_and(open_)} nothing can be said ({why})")
    return "; ".join(parts) + "." if parts else "They have no measure in common."


def _told(line: Mapping[str, Any]) -> str:
    better = line["difference"] > 0
    words = _VERBS[line["quantity"]][0 if better else 1]
    sign = 1 if better else -1
    low, high = sorted((sign * line["low"], sign * line["high"]))
    span = f"(95 % {number(low, 1)} to {number(high, 1)})"
    return words.format(f"{number(abs(line['difference']), 1)} points") + f" {span}"


def _and(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else parts[0]


def show_comparisons(found: Mapping[str, Any], screen: Screen) -> None:
    """Print what `compare_all` found."""
    for at, one in enumerate(found["comparisons"]):
        if at:
            screen.line()
        _show(one, screen)
    screen.line()
    screen.line(
        "In points. E: gain on the target; F: change upstream, negative is forgetting; O = E + F. "
        "difference: A − B with its 95 % interval; p is not corrected for the number of lines. "
        "items: how many A has right more often than B, and less often."
    )
    if any(one["kind"] == "cells" for one in found["comparisons"]):
        screen.line(
            "Two checkpoints were compared, not two methods: other seeds may differ otherwise."
        )


def _show(one: Mapping[str, Any], screen: Screen) -> None:
    a, b = one["a"], one["b"]
    screen.line(f"{one['base']} tuned on {one['target']}", style="bold")
    for letter, side in (("A", a), ("B", b)):
        screen.line(f"{letter}: {side['name']} ({side['cell'] or _seeds(side)})", indent=2)
    screen.line()
    screen.line(one["verdict"], style="bold")
    order = {"measure": 0, "target": 1, "upstream": 2}
    lines = sorted(one["quantities"], key=lambda line: order[line["role"]])
    screen.line()
    screen.table(
        ["", "A", "B", "difference", "95 %", "p", "items"],
        [_cells(line) for line in lines],
        spare=["items"],
    )
    for which, test in _tests(lines):
        screen.line(f"Test of {which}: {test}.")


def _tests(lines: list[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Which test was used for what, said as shortly as it can be."""
    found: dict[str, list[str]] = {}
    for line in lines:
        found.setdefault(line["test"], []).append(line["title"])
    if len(found) == 1:
        return [("all lines", test) for test in found]
    tasks = {line["title"] for line in lines if line["role"] != "measure"}
    return [
        ("each task" if set(names) == tasks else ", ".join(names), test)
        for test, names in found.items()
    ]


def _seeds(side: Mapping[str, Any]) -> str:
    seeds = side["seeds"]
    return f"{side['key']}, {count(len(seeds), 'seed')}: {', '.join(map(str, seeds))}"


def _cells(line: Mapping[str, Any]) -> list[str]:
    signed = line["role"] == "measure"
    span = interval(line["low"], line["high"], 1, signed=True)
    turned = "" if absent(line["won"]) else f"+{line['won']} −{line['lost']}"
    return [
        line["title"], number(line["value_a"], 1, signed), number(line["value_b"], 1, signed),
        number(line["difference"], 1, True), span, p_value(line["p"]), turned,
    ]  # fmt: skip
