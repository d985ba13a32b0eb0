"""What a cell's page says, as (name, value) in text, from its record."""

from __future__ import annotations

import json
from typing import Any

from ballast import tradeoff
from ballast.results import Record
from ballast.site.quantities import FIXED, PHASES, quantities

Facts = list[tuple[str, str]]
LONGEST = 2000  # characters of one value: a setting may hold whole files


def name_of(record: Record) -> str:
    """Method, rank and variant in one piece: "LoRA r8 +tuned"."""
    identity = record["identity"]
    name = str(record["method"]["title"])
    name += "" if identity["rank"] is None else f" r{identity['rank']}"
    return name + (f" +{identity['variant']}" if identity["variant"] else "")


def number(value: Any, digits: int | None = None, signed: bool = False) -> str:
    """A number as a person reads it: thousands apart, a true minus, a dash where there is none."""
    if value is None:
        return "–"
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if digits is None:
        small = abs(value) < 1e6 and value == int(value)
        text = f"{int(value):,}" if small else f"{value:.4g}"
    else:
        text = f"{value:{'+' if signed else ''},.{digits}f}"
    return text.replace("-", "−").replace(",", "\N{NARROW NO-BREAK SPACE}")


def summary(record: Record) -> list[tuple[str, str, str]]:
    """Name, value and meaning of E, F, O and the means; empty for a cell that is not ok."""
    if record["status"] != "ok":
        return []
    found = tradeoff.of_record(record)
    return [
        (FIXED[key].title, number(found[key], 2, FIXED[key].signed), FIXED[key].help)
        for key in ("O", "E", "F", "source_mean", "target_mean", "H")
        if found.get(key) is not None
    ]


def tasks(record: Record) -> list[dict[str, str]]:
    """Scores after and before, and their change, of every task."""
    order = {"target": 0, "upstream": 1, "probe": 2}
    rows = []
    for name, task in sorted(
        record["tasks"].items(), key=lambda item: (order.get(item[1]["role"], 3), item[0])
    ):
        after, before = record["scores"].get(name), record["base_scores"].get(name)
        if after is None or before is None:
            continue
        loss = tradeoff.delta_ce(after.get("loss"), before.get("loss"))
        digits = 1 if task["unit"] == "points" else 3
        rows.append(
            {
                "title": task["title"], "role": task["role"], "metric": task["metric"],
                "unit": task["unit"], "n": number(after["n"]),
                "before": number(before["value"], digits),
                "after": number(after["value"], digits),
                "change": number(after["value"] - before["value"], digits, signed=True),
                "dce": number(loss, 3, signed=True),
            }
        )  # fmt: skip
    return rows


def costs(record: Record) -> Facts:
    """Counts, times by phase and memory, with their units."""
    found, flat_costs = [], dict(_pairs(record["costs"]))
    seconds = record["costs"].get("seconds") or {}
    order = [k for k in FIXED if k in flat_costs] + [f"seconds.{p}" for p in PHASES if p in seconds]
    for key, quantity in quantities(dict.fromkeys(order), {}).items():
        value = flat_costs[key]
        digits = quantity.digits if isinstance(value, float) else 0
        if value is not None:
            found.append((quantity.title, f"{number(value, digits)} {quantity.unit}".strip()))
    return found


def drift(record: Record) -> Facts:
    """How far the model went from the base, as its measures call it."""
    block = {f"drift.{k}": v for k, v in record.get("drift", {}).items()}
    named = quantities(block, {})
    return [(q.title, number(block[key])) for key, q in named.items() if block[key] is not None]


def churn(record: Record) -> list[dict[str, Any]]:
    """Per task: its title, n, and (kind, count, share in percent) of what became of its items."""
    rows = []
    for name, counts in sorted(record.get("churn", {}).items()):
        form = counts.get("forgotten_form") or 0
        parts = {
            "kept": counts["kept"], "gained": counts["gained"],
            "forgotten": counts["forgotten"] - form, "form": form, "never": counts["never"],
        }  # fmt: skip
        n = max(counts["n"], 1)
        shares = [(kind, count, round(100 * count / n, 2)) for kind, count in parts.items()]
        title = record["tasks"].get(name, {}).get("title", name)
        rows.append({"title": title, "n": counts["n"], "parts": shares})
    return rows


def flat(block: dict[str, Any]) -> Facts:
    """Nested settings as lines: names joined by dots, values as text."""
    return [(name, _value(value)) for name, value in _pairs(block) if name]


def _pairs(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        found = []
        for key, inner in value.items():
            found += _pairs(inner, f"{name}.{key}" if name else str(key))
        return found
    return [(name, value)]


def _value(value: Any) -> str:
    if value is None or value == {}:
        return "–"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text)} characters)"
