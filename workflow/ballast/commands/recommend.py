"""`ballast recommend`: the best method and rank under limits, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from ballast.commands.screen import Screen, count, interval
from ballast.results import Results
from ballast.statistics.analysis import LEVEL, Analysis, analyse
from ballast.statistics.rows import row_keys
from ballast.tables.notes import row_name
from ballast.tables.printed import absent, compact, number

# The column that each limit is about, its unit, and how many digits are shown.
LIMITS = {
    "memory_mb": ("MB of memory in training", 0),
    "seconds": ("seconds of training", 1),
    "forgetting": ("points of forgetting", 1),
    "parameters": ("trained parameters", 0),
    "adapter_mb": ("MB of adapter", 2),
}
MB = 1e6
Limits = Mapping[str, float]


def advise(results: Results, base: str, target: str, limits: Limits) -> dict[str, Any]:
    """The best row under the limits, by E where forgetting is limited, else by O.

    limits: of `LIMITS`, upper bounds on a row's mean over seeds; forgetting is −F in points. Rows
    that cannot be told apart from the best within the limits (p adjusted over all pairs of the
    table ≥ 0.05, or no test as one of the two has a single seed) stand beside it.
    """
    analysis = analyse(results, base, target)
    limits = {name: value for name, value in limits.items() if value is not None}
    quantity = "E" if "forgetting" in limits else "O"
    rows = with_costs(analysis.rows[analysis.rows["n_ok"] > 0].copy(), results.table, base, target)
    rows = rows[rows[quantity].notna()]
    broken = pd.DataFrame(
        {name: ~(rows[name] <= value) for name, value in limits.items()}, rows.index
    )
    inside = rows[~broken.any(axis=1)].sort_values(quantity, ascending=False, kind="stable")
    found = {
        "format": 1,
        "command": "recommend",
        "suite": results.suite,
        "base": base,
        "target": target,
        "ranked_by": quantity,
        "limits": {name: limits.get(name) for name in LIMITS},
        "rows": len(analysis.rows),
        "rows_without_result": len(analysis.rows) - len(rows),
        "rows_within_limits": len(inside),
        "excluded_by": {name: _excluded(rows[name], broken[name]) for name in limits},
        "unsure_of_forgetting": _unsure(rows, limits),
        "best": None,
        "not_told_apart": [],
        "decided": False,
    }
    if len(inside):
        found |= _choice(inside, analysis, quantity, limits)
    return found | {"verdict": _verdict(found)}


def with_costs(rows: pd.DataFrame, table: pd.DataFrame, base: str, target: str) -> pd.DataFrame:
    """The rows with the columns of `LIMITS`. A post-hoc cell costs what its parents cost, and its
    own: their seconds are added, and the most memory counts."""
    cells = table[(table["base"] == base) & (table["target"] == target) & (table["status"] == "ok")]
    known = table.set_index("id")
    own = pd.DataFrame(
        {
            "key": row_keys(cells),
            "seconds": cells["seconds.train"].astype(float),
            "memory_mb": cells["memory_mb.train"].astype(float),
        }
    )
    for at, parents in cells["parents"].fillna("").items():
        names = [name for name in parents.split() if name in known.index]
        if names:
            costs = known.loc[names, ["seconds.train", "memory_mb.train"]].astype(float)
            own.loc[at, "seconds"] = own["seconds"].fillna(0)[at] + costs["seconds.train"].sum(
                skipna=False
            )
            own.loc[at, "memory_mb"] = max(
                own["memory_mb"].fillna(0)[at], costs["memory_mb.train"].max()
            )
        elif parents:
            own.loc[at, ["seconds", "memory_mb"]] = float("nan")
    means = own.groupby("key")[["seconds", "memory_mb"]].mean()
    return rows.assign(
        seconds=means["seconds"].reindex(rows.index),
        memory_mb=means["memory_mb"].reindex(rows.index),
        forgetting=-rows["F"],
        parameters=rows["trainable_parameters"],
        adapter_mb=rows["adapter_bytes"] / MB,
    )


def _excluded(values: pd.Series, broken: pd.Series) -> dict[str, int]:
    return {"rows": int(broken.sum()), "of_them_not_measured": int(values.isna().sum())}


def _unsure(rows: pd.DataFrame, limits: Limits) -> int:
    """Rows whose interval of F has the limit of forgetting inside."""
    if "forgetting" not in limits:
        return 0
    bound = -limits["forgetting"]
    return int(((rows["F.low"] < bound) & (rows["F.high"] >= bound)).sum())


def _choice(
    inside: pd.DataFrame, analysis: Analysis, quantity: str, limits: Limits
) -> dict[str, Any]:
    best = inside.index[0]
    pairs = differences_to(best, analysis, quantity).reindex(inside.index)
    apart = pairs["p_adjusted"] < 1 - LEVEL
    tied = inside[~apart & (inside.index != best)]
    return {
        "best": _row(inside.loc[best], best, None, limits),
        "not_told_apart": [_row(row, key, pairs.loc[key], limits) for key, row in tied.iterrows()],
        "decided": len(tied) == 0 and len(inside) > 1,
    }


def differences_to(key: str, analysis: Analysis, quantity: str) -> pd.DataFrame:
    """Differences (row − the row of `key`) by row: difference, low, high, p, p_adjusted."""
    pairs = analysis.pairs
    chosen = pairs[(pairs["quantity"] == quantity) & ((pairs["a"] == key) | (pairs["b"] == key))]
    first = (chosen["a"] == key).to_numpy()
    sign = pd.Series(1.0, chosen.index).mask(first, -1.0)
    low, high = chosen["low"] * sign, chosen["high"] * sign
    found = pd.DataFrame(
        {
            "difference": chosen["difference"] * sign,
            "low": low.where(~first, high),
            "high": high.where(~first, low),
            "p": chosen["p"],
            "p_adjusted": chosen["p_adjusted"],
        }
    )
    found.index = chosen["b"].astype(object).where(first, chosen["a"].astype(object))
    return found


def _row(row: pd.Series, key: str, pair: pd.Series | None, limits: Limits) -> dict[str, Any]:
    found = {
        "key": key,
        "name": row_name(row),
        "method": row["method"],
        "title": row["title"],
        "variant": row["variant"],
        "rank": row["rank"],
        "seeds": len(row["seeds"]),
    }
    for name in ("E", "F", "O"):
        found |= {
            name: row[name],
            f"{name}_low": row[f"{name}.low"],
            f"{name}_high": row[f"{name}.high"],
        }
    found |= {name: row[name] for name in ("seconds", "memory_mb", "parameters", "adapter_mb")}
    if "forgetting" in limits:
        # One seed has no interval, so nothing is known of how sure its forgetting is.
        sure = row["F.low"] >= -limits["forgetting"]
        found["forgets_within_limit_for_sure"] = bool(sure)
    if pair is not None:
        names = {
            "difference": "difference_to_best",
            "low": "difference_low",
            "high": "difference_high",
        }
        found |= {new: pair[old] for old, new in names.items()} | {"p_adjusted": pair["p_adjusted"]}
    return found


def _verdict(found: Mapping[str, Any]) -> str:
    best, tied, quantity = found["best"], found["not_told_apart"], found["ranked_by"]
    if best is None:
        return "No row is within the limits."
    score = f"{quantity} {number(best[quantity], 1, signed=True)} points"
    if found["decided"]:
        return (
            f"Take {best['name']}: {score}, and the tests tell it apart from the other "
            f"{count(found['rows_within_limits'] - 1, 'row')} within the limits."
        )
    if not tied:
        return f"{best['name']} is the only row within the limits: {score}."
    lead = f"{best['name']} has the highest mean ({score})"
    if all(absent(row["p_adjusted"]) for row in tied):
        return (
            f"One seed allows no choice: {lead}, but without a second one nothing is known of the "
            f"noise between it and {count(len(tied), 'other row')} within the limits."
        )
    if found["rows_within_limits"] == len(tied) + 1:
        return (
            f"The noise does not allow a choice: {lead}, but none of the "
            f"{count(len(tied), 'other row')} within the limits can be told apart from it."
        )
    return (
        f"The noise does not allow a choice of one: {lead}, but {count(len(tied), 'row')} of the "
        f"{found['rows_within_limits'] - 1} others within the limits cannot be told apart from it."
    )


def show_advice(found: Mapping[str, Any], screen: Screen, most: int = 12) -> None:
    """Print what `advise` found."""
    screen.line(
        f"{found['base']} tuned on {found['target']} (suite {found['suite']})", style="bold"
    )
    screen.line(_asked(found))
    screen.line()
    screen.line(found["verdict"], style="bold")
    tied = found["not_told_apart"]
    if found["best"]:
        screen.heading("Best mean, then rows that cannot be told apart from it" if tied else "Best")
        _table([found["best"], *tied[:most]], found["ranked_by"], screen)
        if len(tied) > most:
            screen.line(f"and {len(tied) - most} more; --json lists them all")
        _cheapest(found, screen)
    screen.heading("Limits")
    for line in _limits(found):
        screen.line(line, indent=2)


def _asked(found: Mapping[str, Any]) -> str:
    given = [
        f"at most {value:,g} {LIMITS[name][0]}"
        for name, value in found["limits"].items()
        if value is not None
    ]
    by = "E, as forgetting is limited" if found["ranked_by"] == "E" else "O = E + F"
    return f"Asked for: {', '.join(given) if given else 'no limits'}; best by {by}."


def _table(rows: list[Mapping[str, Any]], quantity: str, screen: Screen) -> None:
    """The rows with what they are ranked by, what they are limited by, and what they cost."""
    others = ("F",) if quantity == "E" else ("E", "F")
    lines = []
    for row in rows:
        line = {
            "row": row["name"],
            "seeds": str(row["seeds"]),
            quantity: number(row[quantity], 1, True),
            "95 %": interval(row[f"{quantity}_low"], row[f"{quantity}_high"], 1, True),
            **{name: number(row[name], 1, True) for name in others},
        }
        if quantity == "E":
            line["95 % of F"] = interval(row["F_low"], row["F_high"], 1, True)
        line["difference"] = number(row.get("difference_to_best"), 1, True)
        line["train s"], line["MB"] = number(row["seconds"], 1), number(row["memory_mb"], 0)
        lines.append(line | {"params": compact(row["parameters"])})
    spare = ["seeds", "difference", "95 % of F"] if quantity == "E" else ["seeds", "difference"]
    screen.table(list(lines[0]), [list(line.values()) for line in lines], spare=spare)


def _cheapest(found: Mapping[str, Any], screen: Screen) -> None:
    """Where scores do not decide, costs may."""
    rows = [found["best"], *found["not_told_apart"]]
    if len(rows) == 1:
        return
    best: dict[str, list[str]] = {}
    for name, words in (("seconds", "trains fastest"), ("memory_mb", "needs the least memory"),
                        ("parameters", "trains the fewest parameters")):  # fmt: skip
        known = [row for row in rows if not absent(row[name])]
        if known:
            best.setdefault(min(known, key=lambda row: row[name])["name"], []).append(words)
    if best:
        said = [f"{name} {' and '.join(words)}" for name, words in best.items()]
        screen.line()
        screen.line(f"Of these, {'; '.join(said)}.")


def _limits(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{found['rows_within_limits']} of {count(found['rows'], 'row')} are within the limits."
    ]
    for name, excluded in found["excluded_by"].items():
        words, digits = LIMITS[name]
        bound, rows = number(found["limits"][name], digits), count(excluded["rows"], "row")
        line = f"{bound} {words}: {rows} beyond"
        unknown = excluded["of_them_not_measured"]
        lines.append(line + (f", {unknown} of them not measured." if unknown else "."))
    if found["rows_without_result"]:
        lines.append(f"{count(found['rows_without_result'], 'row')} without a cell that is ok.")
    if {"seconds", "memory_mb"} & set(found["excluded_by"]):
        lines.append("A post-hoc row costs what its parents cost, and its own.")
    if found["unsure_of_forgetting"]:
        rows = count(found["unsure_of_forgetting"], "row")
        lines.append(
            f"Means decide what is within a limit; of {rows} the interval of F reaches across the "
            "limit of forgetting."
        )
    return lines
