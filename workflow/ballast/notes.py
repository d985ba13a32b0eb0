"""What stands below a trade-off table and beside its rows: what a reader must know to trust it."""

from __future__ import annotations

import json
import math
from statistics import fmean
from typing import Any

import pandas as pd

Cell = dict[str, Any]  # a row of the tidy table, what is not there being None
STATES = {
    "failed": "failed",
    "missing": "missing",
    "stale": "stale",
    "rescore": "to be scored again",
}


def status_note(block: list[Cell]) -> str:
    """Why seeds of a row do not count: "1 failed (diverged: NaN), 2 missing", or nothing."""
    parts = []
    for status, word in STATES.items():
        bad = [cell for cell in block if cell["status"] == status]
        if not bad:
            continue
        reasons = sorted({str(cell["reason"]) for cell in bad}) if status == "failed" else []
        why = f" ({'; '.join(_short(reason) for reason in reasons)})" if reasons else ""
        parts.append(f"{len(bad)} {word}{why}")
    return ", ".join(parts)


def _short(text: str, longest: int = 80) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


def row_name(row: Any) -> str:
    """Method, rank and variant of a row in one piece, e.g. "LoRA r8 +tuned"."""
    name = str(row["title"])
    name += "" if pd.isna(row["rank"]) else f" r{int(row['rank'])}"
    return name + (f" +{row['variant']}" if row["variant"] else "")


def footnotes(
    table: pd.DataFrame,
    group: pd.DataFrame,
    named: list[tuple[str, list[Cell]]],
    tasks: dict[str, Any],
) -> list[str]:
    """Footnotes of a trade-off table, in plain text. named: each row with its cells that are ok."""
    found = [
        "E = Target − Target of the untouched base; F = mean of (upstream score − the base's), "
        "negative is forgetting; O = E + F; Avg = (Source + Target) / 2; H = 2 S T / (S + T). "
        "All in points.",
        _spread(table),
        *_marked(table),
        _items(tasks),
        *_losses(table, tasks),
        *_scored(named),
        *_layers(named),
        *_density(named),
        *_rates(group),
        *_base_moves(group),
        *_counts(group),
        "Train s: training steps alone. Memory: the highest during training. Post-hoc methods "
        "train nothing; their parents' costs are not in their rows.",
    ]
    return [note for note in found if note]


def _spread(table: pd.DataFrame) -> str:
    n = sorted(set(table["n_ok"].tolist()[1:]) - {0})
    text = "Mean ± standard deviation over seeds, cells that are ok only"
    return text + ("; one seed has no ±." if 1 in n else ".")


def _marked(table: pd.DataFrame) -> list[str]:
    ranked = [item for item in table.attrs["columns"] if item["ranked"]]
    if not any((table[f"{item['key']} mark"] != "").any() for item in ranked):
        why = (
            "no row has two seeds" if table["n_ok"].max() < 2 else "no difference exceeds the noise"
        )
        return [f"Nothing is marked as better: {why}."]
    single = ", rows with one seed are never marked" if (table["n_ok"] == 1).any() else ""
    return [
        "Bold: best; underlined (Markdown: italic): second best. Rows within one pooled standard "
        f"error of the difference over seeds share a mark{single}; a column in which all rows tie "
        "has none. The noise of the test items is not in it. Costs are not ranked."
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


def _losses(table: pd.DataFrame, tasks: dict[str, Any]) -> list[str]:
    if not any(item["table"] == 2 for item in table.attrs["columns"]):
        return []
    losses = [
        f"{facts['title']} {facts['base_loss']:.3f}"
        for facts in tasks.values()
        if facts.get("base_loss") is not None
    ]
    base = f" The base's own losses: {', '.join(losses)}." if losses else ""
    return [
        "ΔCE = loss − the untouched base's loss, nats per token of the response or text; positive "
        f"is worse. Losses, perplexities and probes enter no mean.{base}"
    ]


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
        return [f"All {len(group)} cells are ok; no row was skipped."]
    return [f"Of {len(group)} cells, not averaged in: {', '.join(bad)}."]
