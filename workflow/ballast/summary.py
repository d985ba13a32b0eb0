"""Trade-off tables in the papers' layout: means over seeds, their spread, and what may be ranked.

Only cells that are ok enter a mean. Differences smaller than the noise are not ranked: s is a
column's standard deviation over seeds, pooled over its rows, and two rows with n and m seeds are
told apart only beyond s sqrt(1/n + 1/m), the standard error of their difference. A row with one
seed has no spread, so it is never marked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from ballast import notes, tradeoff

ROLES = ("upstream", "target", "probe")
KEY = ["family", "method", "variant", "rank"]
Column = dict[str, Any]  # key, header, group, digits, signed, better, ranked, table, base


def column(key: str, header: str, group: str, digits: int = 2, **other: Any) -> Column:
    """How one quantity is shown. better: higher, lower or None; ranked: best and second are marked;
    table: 1 for points and costs, 2 for losses and probes; base: value of the untouched base."""
    common = {"signed": False, "better": "higher", "ranked": True, "table": 1, "base": None}
    return {"key": key, "header": header, "group": group, "digits": digits} | common | other


def tradeoff_tables(tidy: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """One table for each base and target: first the untouched base, then method × variant × rank.

    For each quantity KEY: KEY (mean over the seeds that are ok), `KEY sd` (where at least two are)
    and `KEY mark` (best, second or empty). attrs: base, target, columns (how each is shown) and
    footnotes. Cells that the plan does not have any more are left out.
    """
    planned = tidy[tidy["status"] != "unplanned"]
    return {
        (str(base), str(target)): _table(str(base), str(target), group)
        for (base, target), group in planned.groupby(["base", "target"], sort=True)
    }


def task_facts(group: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """What is known of the tasks, by role and name; cells that are ok are believed first."""
    ordered = group.sort_values("status", key=lambda s: s != "ok", kind="stable")
    found: dict[str, dict[str, Any]] = {}
    for text in ordered["tasks"].drop_duplicates():
        for name, facts in json.loads(text).items():
            found.setdefault(name, facts)
    return dict(sorted(found.items(), key=lambda item: (ROLES.index(item[1]["role"]), item[0])))


def _columns(group: pd.DataFrame, tasks: dict[str, dict[str, Any]]) -> list[Column]:
    def scores(role: str, where: str) -> list[Column]:
        chosen = [k for k, v in tasks.items() if v["role"] == role and v["unit"] == "points"]
        return [
            column(f"score.{k}", tasks[k]["title"], where, base=_base(group, k)) for k in chosen
        ]

    upstream, target = scores("upstream", "Upstream"), scores("target", "Downstream")
    s = tradeoff.source_mean({c["key"]: c["base"] for c in upstream if c["base"] is not None})
    t = tradeoff.target_mean({c["key"]: c["base"] for c in target if c["base"] is not None})
    cost = {"better": "lower", "ranked": False}
    first = [
        *upstream,
        column("source_mean", "Source", "Upstream", base=s),
        column("F", "F", "Upstream", signed=True),
        *(target if len(target) > 1 else []),
        column("target_mean", "Target", "Downstream", base=t),
        column("E", "E", "Downstream", signed=True),
        column("Avg", "Avg", "Both", base=tradeoff.average(s, t)),
        column("H", "H", "Both", base=tradeoff.harmonic_mean(s, t)),
        column("O", "O", "Both", signed=True),
        column("trainable_parameters", "Trainable", "Cost", 0, **cost),
        column("seconds.train", "Train s", "Cost", 1, **cost),
        column("memory_mb.train", "Memory MB", "Cost", 0, **cost),
    ]
    return first + _separate(group, tasks)


def _separate(group: pd.DataFrame, tasks: dict[str, dict[str, Any]]) -> list[Column]:
    """Columns of the second table: losses, and whatever is a probe or not in points."""
    found = []
    for name, facts in tasks.items():
        if f"dce.{name}" in group and group[f"dce.{name}"].notna().any():
            shown = {"signed": True, "better": "lower", "base": 0.0}
            header = f"ΔCE {facts['title']}"
            found.append(column(f"dce.{name}", header, "ΔCE, nats per token", 3, table=2, **shown))
    for name, facts in tasks.items():
        if facts["role"] == "probe" or facts["unit"] != "points":
            unit = {"points": "points", "nats": "nats per token", "perplexity": "perplexity"}
            header = f"{facts['title']} ({facts['metric']}, {unit[facts['unit']]})"
            shown = {"better": facts["direction"], "base": _base(group, name), "table": 2}
            digits = 2 if facts["unit"] == "points" else 3
            found.append(column(f"score.{name}", header, "Own scales", digits, **shown))
        for key in sorted(k for k in group if k.startswith(f"extra.{name}.")):
            if group[key].notna().any():
                found.append(_extra(group, key, key.removeprefix(f"extra.{name}."), facts))
    return found


def _extra(group: pd.DataFrame, key: str, name: str, facts: dict[str, Any]) -> Column:
    perplexity = name.endswith("perplexity")
    header = f"{facts['title']} ({name.replace('_', ' ')}{', %' if name == 'answered' else ''})"
    shown = {"better": "lower" if perplexity else None, "ranked": perplexity}
    base = _mean(group.get(f"base_{key}"))
    digits = 3 if perplexity else 2
    return column(key, header, "Own scales", digits, table=2, base=base, **shown)


def _base(group: pd.DataFrame, task: str) -> float | None:
    return _mean(group.get(f"base.{task}"))


def _mean(values: pd.Series | None) -> float | None:
    return None if values is None or values.isna().all() else fmean(values.dropna())


def _table(base: str, target: str, group: pd.DataFrame) -> pd.DataFrame:
    kept = [name for name in group if "." not in name or group[name].notna().any()]
    group = group[kept]
    tasks = task_facts(group)
    columns = _columns(group, tasks)
    blocks = _blocks(group)
    rows = [_zero_shot(columns)]
    rows += [
        _row(block, title, columns) for block, title in zip(blocks, _titles(blocks), strict=True)
    ]
    data = {key: [row[key] for row in rows] for key in rows[0]}
    for item in columns:
        key = item["key"]
        found = [""] * (len(rows) - 1)
        if item["ranked"] and item["better"]:
            found = marks(data[key][1:], data[f"{key} sd"][1:], data["n_ok"][1:], item["better"])
        data[f"{key} mark"] = ["", *found]
    table = pd.DataFrame(data)
    table["rank"] = table["rank"].astype("Int64")
    for item in columns:
        for key in (item["key"], f"{item['key']} sd"):
            table[key] = table[key].astype("float64")
    table.attrs = {"base": base, "target": target, "columns": columns}
    names = [notes.row_name(row) for row in rows[1:]]
    named = [
        (name, [cell for cell in block if cell["status"] == "ok"])
        for name, block in zip(names, blocks, strict=True)
    ]
    table.attrs["footnotes"] = notes.footnotes(table, group, named, tasks)
    return table


def _blocks(group: pd.DataFrame) -> list[list[dict[str, Any]]]:
    """The cells of each row of the table, what is not there being None."""
    plain = group.astype(object).where(group.notna(), None)
    blocks: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for cell in plain.to_dict("records"):
        blocks.setdefault(tuple(cell[key] for key in KEY), []).append(cell)
    return list(blocks.values())


def _titles(blocks: Sequence[list[dict[str, Any]]]) -> list[str]:
    """Titles of methods; where two methods share one, their names are added."""
    first = [block[0] for block in blocks]
    names: dict[str, set[str]] = {}
    for cell in first:
        names.setdefault(cell["title"], set()).add(cell["method"])
    return [
        cell["title"] if len(names[cell["title"]]) == 1 else f"{cell['title']} ({cell['method']})"
        for cell in first
    ]


def _zero_shot(columns: Iterable[Column]) -> dict[str, Any]:
    row = {"method": "", "title": "Zero-shot", "family": "", "variant": "", "rank": None}
    row |= {"seeds": "", "n_ok": 0, "n_planned": 0, "learning_rate": "", "note": "untouched base"}
    for item in columns:
        row |= {item["key"]: item["base"], f"{item['key']} sd": None}
    return row


def _row(block: list[dict[str, Any]], title: str, columns: Iterable[Column]) -> dict[str, Any]:
    good = [cell for cell in block if cell["status"] == "ok"]
    row = {key: block[0][key] for key in ("method", "family", "variant", "rank")}
    row |= {"title": title, "seeds": f"{len(good)}/{len(block)}"}
    row |= {"n_ok": len(good), "n_planned": len(block), "note": notes.status_note(block)}
    rates = sorted({cell["learning_rate"] for cell in block} - {None})
    row["learning_rate"] = " / ".join(f"{rate:.3g}" for rate in rates)
    for item in columns:
        key = item["key"]
        values = [float(cell[key]) for cell in good if cell.get(key) is not None]
        row[key] = fmean(values) if values else None
        row[f"{key} sd"] = stdev(values) if len(values) > 1 else None
    return row


def pooled_sd(sds: Sequence[float | None], n: Sequence[int]) -> float | None:
    """Standard deviation over seeds pooled over rows, weighted by n − 1; None if no row has two."""
    parts = [(sd, m - 1) for sd, m in zip(sds, n, strict=True) if m > 1 and _known(sd)]
    weight = sum(m for _, m in parts)
    return math.sqrt(math.fsum(sd * sd * m for sd, m in parts) / weight) if weight else None


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def marks(
    means: Sequence[float | None], sds: Sequence[float | None], n: Sequence[int], better: str
) -> list[str]:
    """best and second for each row, or nothing.

    Rows within one pooled standard error of the best share its mark; of the rest, the best and
    those within one of it are second. If nobody is left behind the best, nothing is marked.
    """
    sd = pooled_sd(sds, n)
    found = [""] * len(means)
    sign = -1.0 if better == "lower" else 1.0
    left = {i: sign * v for i, v in enumerate(means) if _known(v) and n[i] > 1}
    for mark in ("best", "second"):
        if len(left) == 0 or sd is None:
            break
        top = max(left, key=lambda i: (left[i], -i))
        tied = [i for i in left if left[top] - left[i] <= error_of(sd, n[top], n[i])]
        if mark == "best" and len(tied) == len(left):
            break
        for i in tied:
            found[i] = mark
            del left[i]
    return found


def error_of(sd: float, n: int, m: int) -> float:
    """Standard error of the difference of two means over n and m seeds, plus rounding."""
    return sd * math.sqrt(1 / n + 1 / m) + 1e-9


def spans(
    means: Sequence[float | None], sds: Sequence[float | None], n: Sequence[int]
) -> list[str]:
    """Ranks that each row may hold, higher first: "1", or "2-4" where rows cannot be told apart."""
    sd = pooled_sd(sds, n)
    rows = {i: v for i, v in enumerate(means) if _known(v) and n[i] > 1}
    found = [""] * len(means)
    for i, value in rows.items():
        others = [(v - value, error_of(sd or 0.0, n[i], n[j])) for j, v in rows.items() if j != i]
        low = 1 + sum(gap > error for gap, error in others)
        high = len(rows) - sum(-gap > error for gap, error in others)
        found[i] = str(low) if low == high else f"{low}-{high}"
    return found
