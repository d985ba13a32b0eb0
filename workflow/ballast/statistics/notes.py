"""What a reader must know of the statistics of a table, in plain sentences."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ballast.statistics.points import COMPARED


def sentences(
    rows: pd.DataFrame, pairs: pd.DataFrame, definitions: pd.DataFrame, facts: dict[str, Any],
    control: str | None,
) -> tuple[str, ...]:  # fmt: skip
    """The notes of an analysis, in the order in which a table should print them."""
    if facts["seeds"] < 2:
        return tuple(
            x for x in (_seeds(rows, facts), _doubles(facts), _stability(definitions)) if x
        )
    found = (
        _seeds(rows, facts), _doubles(facts), _test(rows, facts), _corrections(control),
        _ranks(rows), _detectable(facts), _floor(facts), _front(facts), _stability(definitions),
    )  # fmt: skip
    return tuple(text for text in found if text)


def _seeds(rows: pd.DataFrame, facts: dict[str, Any]) -> str:
    counts = rows.loc[rows["n_ok"] > 0, "n_ok"]
    if not len(counts):
        return "No cell is ok: nothing is compared."
    if facts["seeds"] == 1:
        return "Every row has one seed: no interval, test, rank or front is given."
    low, high = int(counts.min()), int(counts.max())
    many = f"{high} seeds" if low == high else f"{low} to {high} seeds"
    text = f"{many} a row. Intervals of means: 95 % t intervals over seeds."
    single = int((counts == 1).sum())
    if single:
        have = "row has" if single == 1 else "rows have"
        text += f" {single} {have} one seed, and neither interval nor rank."
    return text


def _doubles(facts: dict[str, Any]) -> str:
    n = facts["doubles"]
    return f"{n} further results of the same cells and seeds are not averaged in." if n else ""


def _test(rows: pd.DataFrame, facts: dict[str, Any]) -> str:
    with_items = [name for name in COMPARED if facts[f"{name}.itemed"]]
    if not with_items:
        return "Tests: t test paired by seed; the noise of the test items is not in it."
    n = int((rows["n_ok"] > 0).sum())
    lacking = n - min(facts[f"{name}.itemed"] for name in with_items)
    text = (
        "Tests between rows are paired by seed and item: a difference counts where it exceeds both "
        "the noise of the seeds (paired t) and that of seeds and items together (crossed random "
        "effects, Satterthwaite)"
    )
    others = [name for name in COMPARED if name not in with_items]
    if others:
        text += f"; of {', '.join(others)} by seed alone, as items are not known"
    if lacking:
        text += f"; {lacking} of {n} rows lack items and are compared by seed alone"
    if not all(facts[f"{name}.based"] for name in with_items):
        text += "; against the base by seed alone, as its items are not kept"
    lent = [f"{name} {facts[f'{name}.lent']:.1f}" for name in COMPARED if facts[f"{name}.lent"]]
    if lent:
        text += (
            ". Variances over seeds are moderated by those of the table's other pairs (empirical "
            f"Bayes, Smyth 2004); degrees of freedom lent: {', '.join(lent)}"
        )
    return text + "."


def _corrections(control: str | None) -> str:
    against = f"the control ({control}) and against the base" if control else "the base"
    return (
        f"p values against {against} are corrected by Holm, those of all pairs of rows by "
        "Benjamini and Hochberg, for each quantity by itself."
    )


def _ranks(rows: pd.DataFrame) -> str:
    low = rows["O.rank_low"].dropna()
    if len(low) < 2:
        return ""
    return (
        "Ranks are those that a row may hold given the significant differences; "
        f"{int((low == 1).sum())} of {len(low)} rows may be first by O."
    )


def _detectable(facts: dict[str, Any]) -> str:
    parts = [
        f"{name} {facts[f'{name}.minimum_detectable']:.1f} "
        f"({facts[f'{name}.minimum_detectable_median']:.1f})"
        for name in COMPARED
        if facts[f"{name}.minimum_detectable"] is not None
    ]
    if not parts:
        return ""
    return (
        "Smallest difference of two rows that is found with power 0.8 at p < .05, before "
        "correction, in points, from the variance pooled over all pairs (and of the median pair): "
        f"{', '.join(parts)}."
    )


def _floor(facts: dict[str, Any]) -> str:
    parts = [
        f"{name} {facts[f'{name}.noise_floor']:.1f}"
        for name in COMPARED
        if facts[f"{name}.noise_floor"] is not None
    ]
    if not parts:
        return ""
    pairs = max(facts[f"{name}.noise_pairs"] for name in COMPARED)
    return (
        "A/A noise floor: two runs of one row with other seeds differ by less than "
        f"{', '.join(parts)} points in 95 % of {pairs} pairs."
    )


def _front(facts: dict[str, Any]) -> str:
    text = (
        f"Front: share of {facts['draws']} bootstrap draws of seeds and items, joint for all rows, "
        f"in which a row is not dominated in E and F. Over {facts['seeds']} seeds a bootstrap "
        "varies too little: shares near 0 and 1 are too sure."
    )
    if facts["hypervolume"] is None:
        return text
    low, high = facts["hypervolume_low"], facts["hypervolume_high"]
    return (
        f"{text} Hypervolume, of what is possible: {facts['hypervolume']:.3f} "
        f"(percentile interval {low:.3f} to {high:.3f}, which also undercovers)."
    )


def _stability(definitions: pd.DataFrame) -> str:
    known = definitions.dropna(subset=["tau"])
    of_o = known[(known["a"] == "O") | (known["b"] == "O")]
    if of_o.empty:
        return ""
    other = of_o["a"].where(of_o["a"] != "O", of_o["b"])
    parts = [f"{name} {tau:.2f}" for name, tau in zip(other, of_o["tau"], strict=True)]
    lowest = known.loc[known["tau"].idxmin()]
    return (
        f"Rank stability, Kendall's tau between the order by O and by {', '.join(parts)}; least "
        f"agreement {lowest['tau']:.2f}, {lowest['a']} and {lowest['b']}."
    )
