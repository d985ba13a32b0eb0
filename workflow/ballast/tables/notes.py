"""What stands below a table and beside its rows: what a reader must know to trust it."""

from __future__ import annotations

import json
import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pandas as pd

from ballast.statistics.analysis import COMPARED, LEVEL
from ballast.tables.printed import absent, number

if TYPE_CHECKING:
    from ballast.tables.summary import Place

Cell = dict[str, Any]  # a row of the tidy table, what is not there being None
STATES = {
    "failed": "failed",
    "missing": "missing",
    "stale": "stale",
    "rescore": "to be scored again",
}


def row_name(row: Any) -> str:
    """Method, rank and variant of a row in one piece, e.g. "LoRA r8 +tuned"."""
    name = str(row.get("name") or row["title"])
    name += "" if pd.isna(row["rank"]) else f" r{int(row['rank'])}"
    return name + (f" +{row['variant']}" if row["variant"] else "")


def tradeoff(place: Place) -> tuple[str, ...]:
    """Notes of the trade-off table: signs, spreads, marks, and what statistics says of it."""
    return (
        "E = Target − Target of the untouched base; F = mean of (upstream score − the base's), "
        "negative is forgetting; O = E + F. Mean ± standard deviation over the seeds that are ok; "
        f"95 %: t interval of the mean over them.{_single(place)}",
        _marks(place),
        *place.analysis.notes,
        *_counts(place.cells),
    )


def _single(place: Place) -> str:
    few = (place.analysis.rows["n_ok"] == 1).sum()
    return " A row with one seed has no spread, interval or rank." if few else ""


def _marks(place: Place) -> str:
    analysis = place.analysis
    lows = [row.get(f"{key}.rank_low") for row in place.rows.values() for key in COMPARED]
    if all(absent(low) for low in lows):
        return "Nothing is ranked or marked as better: no row has two seeds."
    text = (
        "#: ranks by O that the row may hold; rows that the tests do not tell apart share them. "
        "Bold: no row is found to be better; a column in which that holds for every row has none."
    )
    if analysis.control is None:
        return text
    control = row_name(place.rows[analysis.control])
    return (
        f"{text} ↑ better, ↓ worse than {control}; ° not told apart from the untouched base "
        f"(adjusted p at {1 - LEVEL:.2f})."
    )


def smallest(place: Place) -> list[str]:
    """One line on how small a difference may be and still be found, and on the A/A noise."""
    parts = [
        f"{title}: {', '.join(found)}"
        for title, key in (
            ("Minimum detectable difference of two rows, points", "minimum_detectable"),
            ("A/A noise floor", "noise_floor"),
        )
        if (found := _of_compared(place.analysis.facts, key))
    ]
    return [f"{'. '.join(parts)}."] if parts else []


def _of_compared(facts: dict[str, Any], key: str) -> list[str]:
    values = {name: facts.get(f"{name}.{key}") for name in ("E", "F", "O")}
    return [f"{name} {number(value, 1)}" for name, value in values.items() if not absent(value)]


def control(place: Place) -> tuple[str, ...]:
    """Notes of the comparison with the control."""
    name = row_name(place.rows[str(place.analysis.control)])
    return (
        f"Δ: mean difference to {name} over the seeds that both have, its {100 * LEVEL:.0f} % "
        "interval, and p of the test paired by seed and item, corrected for the number of rows "
        f"(Holm); ↑ better, ↓ worse at p < {1 - LEVEL:.2f}. Rank: ranks that the row may hold by "
        "the tests of all pairs (Benjamini and Hochberg). A row that shares fewer than two seeds "
        "with the control has no interval or p.",
    )


def scores(place: Place) -> tuple[str, ...]:
    """Notes of the scores: the tasks, and whether the records agree on the base."""
    found = [
        "Source, Target: means over the upstream and the target's tasks; Avg = (Source + Target) / "
        "2; H = 2 S T / (S + T).",
        _items(place.tasks),
        *_base_moves(place.cells),
    ]
    return tuple(note for note in found if note)


def costs(place: Place) -> tuple[str, ...]:
    """Notes of the costs and settings."""
    named = named_cells(place)
    return (
        *_scored(named),
        *_layers(named),
        *_density(named),
        *_rates(place.cells),
        "Train s: training steps alone. Memory: the highest during training. Post-hoc methods "
        "train nothing; their parents' costs are not in their rows.",
    )


def losses(place: Place) -> tuple[str, ...]:
    """Notes of losses and probes."""
    known = [
        f"{facts['title']} {facts['base_loss']:.3f}"
        for facts in place.tasks.values()
        if facts.get("base_loss") is not None
    ]
    base = f" The base's own losses: {', '.join(known)}." if known else ""
    return (
        "ΔCE = loss − the untouched base's loss, nats per token of the response or text; positive "
        f"is worse.{base}",
    )


def named_cells(place: Place) -> list[tuple[str, list[Cell]]]:
    """Each row's name with its cells that are ok."""
    good = place.cells[place.cells["status"] == "ok"]
    kept = [
        name
        for name in good
        if name in ("method", "variant", "rank", "scored", "hyper")
        or (name.startswith("report.") and ("density" in name or name == "report.layers"))
    ]
    plain = good[kept].astype(object)
    blocks: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in plain.where(good[kept].notna(), None).to_dict("records"):
        blocks.setdefault((cell["method"], cell["variant"], cell["rank"]), []).append(cell)
    return [
        (row_name(row), blocks.get((row["method"], row["variant"], row["rank"]), []))
        for row in place.rows.values()
    ]


def _items(tasks: dict[str, Any]) -> str:
    parts = []
    for facts in tasks.values():
        n = facts.get("n")
        text = f"{facts['title']} ({facts['role']}, {facts['metric']}"
        text += f", {n} items" if n else ""
        if n and facts["unit"] == "points":
            text += f", standard error from items up to {100 * math.sqrt(0.25 / n):.1f}"
        if facts["chance"] is not None:
            text += f", chance {facts['chance']:g}"
        parts.append(text + ")")
    return f"Tasks: {'; '.join(parts)}." if parts else ""


def _scored(named: list[tuple[str, list[Cell]]]) -> list[str]:
    kinds: dict[str, list[str]] = {}
    for name, cells in named:
        kind = " and ".join(sorted({cell["scored"] for cell in cells} - {None}))
        if kind:
            kinds.setdefault(kind, []).append(name)
    if not kinds:
        return []
    if len(kinds) == 1:
        return [f"Scored weights: {next(iter(kinds))} in every row."]
    most = max(sorted(kinds), key=lambda kind: len(kinds[kind]))
    others = "; ".join(f"{k}: {', '.join(v)}" for k, v in sorted(kinds.items()) if k != most)
    return [f"Scored weights: {most}, except {others}."]


def _layers(named: list[tuple[str, list[Cell]]]) -> list[str]:
    """k of the methods that tune some of the layers: as measured (report.layers), else as set."""
    parts: dict[str, None] = {}
    for name, cells in named:
        for cell in cells:
            hyper, k = json.loads(cell["hyper"]), cell.get("report.layers")
            if "layers" not in hyper:
                continue
            if k is None:
                k = "a quarter" if hyper["layers"] is None else hyper["layers"]
                parts[f"{name} layers = {k}"] = None
            else:
                parts[f"{name} k = {k:g}"] = None
    return [f"Layers tuned: {'; '.join(parts)}."] if parts else []


def _density(named: list[tuple[str, list[Cell]]]) -> list[str]:
    parts = []
    for name, cells in named:
        keys = sorted(k for k in (cells or [{}])[0] if k.startswith("report.") and "density" in k)
        found = []
        for key in keys:
            values = [cell[key] for cell in cells if cell[key] is not None]
            label = key.removeprefix("report.").replace("_", " ")
            found += [f"{label} {fmean(values):.3g}"] if values else []
        parts += [f"{name} {', '.join(found)}"] if found else []
    return [f"Measured (mean over seeds): {'; '.join(parts)}."] if parts else []


def _rates(group: pd.DataFrame) -> list[str]:
    sources = group.loc[group["learning_rate"].notna(), "learning_rate_source"].dropna()
    counts = sources.value_counts()
    parts = [f"{name} ({counts[name]} cells)" for name in sorted(counts.index)]
    return [f"Where the learning rates come from: {', '.join(parts)}."] if parts else []


def _base_moves(group: pd.DataFrame) -> list[str]:
    """Warn if records of one table were measured against different scores of the base."""
    moved = [
        key.removeprefix("base.")
        for key in sorted(k for k in group if k.startswith("base."))
        if group[key].max() - group[key].min() > 1e-9
    ]
    if not moved:
        return []
    return [
        f"Caution: the records disagree on the untouched base's score of {', '.join(moved)} (other "
        "machines?); each cell is compared with its own, and Zero-shot shows the mean."
    ]


def _counts(group: pd.DataFrame) -> list[str]:
    counts = group["status"].value_counts()
    bad = [f"{counts[key]} {word}" for key, word in STATES.items() if key in counts.index]
    if not bad:
        return [f"All {len(group)} cells are ok; none was left out."]
    return [f"Of {len(group)} cells, not averaged in: {', '.join(bad)}."]
