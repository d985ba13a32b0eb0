"""The tables beyond the trade-off: churn, drift, further measures, equal specialization, tuning,
definitions of "best", and the papers' numbers beside ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from ballast import rates
from ballast.curves.equal import at_equal_specialization
from ballast.measures import MEASURES
from ballast.tables import DERIVED
from ballast.tables.printed import (
    DASH,
    Cell,
    Column,
    Table,
    absent,
    figures,
    interval,
    number,
    share,
)
from ballast.tables.summary import METHOD, Place, Row, by_row, mean_cell, raw_rows

CHURN = ("n", "kept", "gained", "forgotten", "never", "forgotten_form", "forgotten_likely")


# Churn: what became of the items that the base answered.


def churn_counts(place: Place) -> pd.DataFrame:
    """Counts of items summed over the seeds that are ok: row, task, subject (empty: the whole task)
    and CHURN. What a record does not have (form, likelihood) is missing."""
    found = [
        {"row": row, "task": task, "subject": subject} | counts
        for row, record in _records(place)
        for task, block in record.get("churn", {}).items()
        for subject, counts in _subjects(block)
    ]
    frame = pd.DataFrame(found, columns=["row", "task", "subject", *CHURN])
    keys = ["row", "task", "subject"]
    frame[list(CHURN)] = frame[list(CHURN)].astype("Int64")
    return frame.groupby(keys, sort=False)[list(CHURN)].sum(min_count=1).reset_index()


def _records(place: Place) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of the cells that are ok, each with the key of its row."""
    keys = {(r["method"], r["variant"], r["rank"]): key for key, r in place.rows.items()}
    good = place.cells[place.cells["status"] == "ok"]
    names = good[["id", "method", "variant", "rank"]].astype(object)
    for cell, method, variant, rank in names.itertuples(index=False, name=None):
        rank = None if pd.isna(rank) else rank
        yield keys[method, variant, rank], place.results.records[cell]


def _subjects(block: dict[str, Any]) -> Iterator[tuple[str, dict[str, int]]]:
    yield "", {k: v for k, v in block.items() if k != "subjects"}
    yield from sorted(block.get("subjects", {}).items())


def churn_tables(place: Place) -> list[Table]:
    """Kept, gained, forgotten and never right: over all upstream tasks, by task, by subject."""
    counts = churn_counts(place)
    upstream = [name for name in place.tasks if place.tasks[name]["role"] == "upstream"]
    counts = counts[counts["task"].isin(upstream)]
    if counts.empty:
        return []
    whole = counts[counts["subject"] == ""]
    tables = [_churn_pooled(place, whole, counts), _churn_by(place, whole, "task")]
    subjects = counts[counts["subject"] != ""]
    return tables if subjects.empty else [*tables, _churn_by(place, subjects, "subject")]


def _churn_pooled(place: Place, whole: pd.DataFrame, raw: pd.DataFrame) -> Table:
    pooled = whole.groupby("row", sort=False)[list(CHURN)].sum(min_count=1)
    sums = {str(k): v for k, v in zip(pooled.index, pooled.to_dict("records"), strict=True)}
    shown = [("kept", "Kept"), ("gained", "Gained"), ("forgotten", "Forgotten"), ("never", "Never")]
    parts = [("forgotten_form", "no answer"), ("forgotten_likely", "still likely")]
    columns = [Column("Items")] + [Column(header, "% of items") for _, header in shown]
    columns += [Column(header, "% of the forgotten") for _, header in parts]

    def line(row: Row) -> list[Cell]:
        found = sums.get(row["key"])
        if found is None:
            return [Cell(DASH)] * len(columns)
        cells = [Cell(f"{found['n']:,}")]
        cells += [Cell(_percent(found[key], found["n"])) for key, _ in shown]
        return cells + [Cell(_percent(found[key], found["forgotten"])) for key, _ in parts]

    return by_row(
        place, columns, line, name="churn", title="Churn of the upstream items", raw=raw,
        about="What became of the items that the untouched base answered, over all upstream tasks "
        "and seeds.",
        notes=(
            "Kept: right before and after; gained: wrong before, right after; forgotten: right "
            "before, wrong after; never: wrong both times. An item is right from a score of one "
            "half. No answer: the text that was generated is empty or not of the task's form, so "
            "that format was lost rather than knowledge. Still likely: the true answer keeps a "
            "probability of one half or more per token, though another text was generated.",
        ),
    )  # fmt: skip


def _percent(part: Any, whole: Any) -> str:
    if absent(part) or absent(whole) or whole == 0:
        return DASH
    return number(100 * part / whole, 1)


def _churn_by(place: Place, counts: pd.DataFrame, by: str) -> Table:
    """Forgotten and gained, in % of the items of each task or subject."""
    titles = {name: place.tasks[name]["title"] for name in place.tasks}
    if by == "task":
        groups = {name: (titles[name], "") for name in dict.fromkeys(counts["task"])}
        of = counts["task"]
    else:
        of = counts["task"] + "\n" + counts["subject"]
        groups = {
            key: (key.split("\n")[1], titles[key.split("\n")[0]]) for key in dict.fromkeys(of)
        }
    names = ["row", "n", "forgotten", "gained"]
    found = {
        (row, group): (_percent(forgotten, n), _percent(gained, n))
        for group, (row, n, forgotten, gained) in zip(
            of, counts[names].itertuples(index=False, name=None), strict=True
        )
    }
    columns = [Column(title, group or "Forgotten / gained, %") for title, group in groups.values()]

    def line(row: Row) -> list[Cell]:
        pairs = [found.get((row["key"], group)) for group in groups]
        return [Cell(DASH if pair is None else f"{pair[0]} / {pair[1]}") for pair in pairs]

    return by_row(
        place, columns, line, name=f"churn-{by}s", title=f"Churn by {by}", raw=counts,
        about=f"Forgotten / gained, in % of the items of each upstream {by}.",
    )  # fmt: skip


# Numbers that have columns of their own: drift and derived measures.


# The same number as KL(base‖tuned), and how many tokens that was measured on.
_TWICE = ("drift.kl_corrected", "drift.tokens")


def drift_table(place: Place) -> Table | None:
    """How far the tuned model went from the base; None if no record has measured it."""
    keys = [key for key in place.cells if key.startswith("drift.") and key not in _TWICE]
    return _measures(
        place, keys, "drift", "Drift from the base",
        "Distances between the tuned model and the untouched base, mean ± sd over seeds.",
    ) if keys else None  # fmt: skip


def derived_table(place: Place) -> Table | None:
    """Further definitions of the trade-off; None if the tidy table has none."""
    keys = [key for key in DERIVED if key in place.cells and place.cells[key].notna().any()]
    return _measures(
        place, keys, "derived", "Further measures of the trade-off",
        "Each is empty where its denominator is within the noise.",
    ) if keys else None  # fmt: skip


def _measures(place: Place, keys: list[str], name: str, title: str, about: str) -> Table:
    known = {key: MEASURES.get(key.removeprefix("drift.")) for key in keys}
    headers = {
        key: key.removeprefix("drift.").replace("_", " ") if m is None else m.title
        for key, m in known.items()
    }
    notes = [f"{m.title}: {m.formula}; {m.sign}." for m in known.values() if m is not None]

    def cell(row: Row, key: str) -> Cell:
        sd = row.get(f"{key}.sd")
        # What differs by rounding alone is the same.
        same = not absent(sd) and sd < 1e-9 * abs(row[key])
        return Cell(
            figures(row.get(key)), "" if absent(sd) else f"± {figures(0 if same else sd, 2)}"
        )

    return by_row(
        place, [Column(headers[key]) for key in keys],
        lambda row: [cell(row, key) for key in keys],
        name=name, title=title, about=about, raw=raw_rows(place, keys), notes=tuple(notes),
    )  # fmt: skip


# Retention where methods have learned the same.


CURVE = {"trajectory": "trajectory over training", "rewind": "rewind W0 + αΔW"}


def equal_table(place: Place) -> Table | None:
    """Stability at equal specialization; None without curves."""
    if place.results.curves.empty:
        return None
    here = place.analysis.base, place.analysis.target
    frame = at_equal_specialization(place.results, *here)
    levels = [name for name in frame if name.startswith("F@") and f"{name}.low" in frame]
    if frame.empty or not levels:
        return None
    found = {str(k): v for k, v in zip(frame.index, frame.to_dict("records"), strict=True)}
    ways = " or ".join(CURVE[kind] for kind in frame.attrs["kinds"])
    columns = [Column("E", "End point"), Column("F", "End point")]
    for level in levels:
        at = f"At E = {level.removeprefix('F@')}"
        columns += [Column("F", at), Column("95 %", at), Column("Reached", at)]

    def line(row: Row) -> list[Cell]:
        cells, at = (
            [mean_cell(row, "E", 2, True), mean_cell(row, "F", 2, True)],
            found.get(row["key"], {}),
        )
        for level in levels:
            cells += [
                Cell(number(at.get(level), 2, signed=True)),
                Cell(interval(at.get(f"{level}.low"), at.get(f"{level}.high"))),
                Cell(share(at.get(level.replace("F@", "reached@")))),
            ]
        return cells

    raw = raw_rows(place, ("E", "F")).join(frame, on="row")
    return by_row(
        place, columns, line, name="equal", title="At equal specialization", raw=raw,
        about="What has been forgotten where methods have learned the same amount, beside their "
        "end points.",
        notes=(
            f"F where a cell's {ways} first reaches E, interpolated; reached: share of the seeds "
            "that get so far. A method that learned little forgets little: its end point says "
            "nothing about its stability.",
        ),
    )  # fmt: skip


# The learning rate: as the method says, and as found on validation.


def tuning_table(place: Place) -> Table | None:
    """Default and tuned learning rates with their validation scores; None if none was tuned."""
    known = place.results.rates
    if known is None:
        return None
    here = (known["base"] == place.analysis.base) & (known["target"] == place.analysis.target)
    if not here.any():
        return None
    frame = rates.tuning_table(known[here])
    titles = {row["method"]: row["name"] for row in place.rows.values()}
    columns = [Column(f"{what} rate", "Learning rate") for what in ("Default", "Tuned")]
    columns += [Column(what, "Target on validation") for what in ("Default", "Tuned", "Gain")]
    columns += [Column("Sensitivity", "Target on validation")]
    columns += [Column(what, "F") for what in ("Default", "Tuned")]
    columns += [Column("Rates × seeds", align="center"), Column("Failed")]
    rows = [
        [
            Cell(titles.get(row["method"], row["method"])),
            Cell("" if absent(row["rank"]) else str(int(row["rank"]))),
            Cell(row["variant"]),
            Cell(figures(row["default_rate"])),
            Cell(figures(row["rate"]), marks=("edge",) if row["at_edge"] else ()),
            *(Cell(number(row[key], 2)) for key in ("default", "tuned")),
            Cell(number(row["gain"], 2, signed=True)),
            Cell(number(row["sensitivity"], 2)),
            *(Cell(number(row[f"F.{key}"], 2, signed=True)) for key in ("default", "tuned")),
            Cell(f"{row['rates']} × {row['seeds']}"),
            Cell(str(row["failed"])),
        ]
        for row in frame.to_dict("records")
    ]
    return Table(
        "tuning", "Default and tuned learning rates",
        "Every method has the same budget of rates; the choice is made on validation items only.",
        (*METHOD, *columns), rows, frame,
        (
            "Sensitivity: how many points lower than the best rate's score that of a rate taken "
            "from the grid at random is, on average; 0: any rate will do. ‡: the first or last "
            "rate of the grid was chosen, so a better one may lie beyond.",
        ),
    )  # fmt: skip


# What "best" means.


def definitions_table(place: Place) -> Table | None:
    """Kendall's τ between the orders that definitions of "best" give; None for too few rows."""
    pairs = place.analysis.definitions
    if pairs.empty or pairs["tau"].isna().all():
        return None
    names = list(dict.fromkeys([*pairs["a"], *pairs["b"]]))
    tau = {frozenset((a, b)): t for a, b, t in pairs[["a", "b", "tau"]].itertuples(index=False)}
    rows = [
        [Cell(a), *(Cell("" if a == b else number(tau.get(frozenset((a, b))), 2)) for b in names)]
        for a in names
    ]
    worst = pairs.loc[pairs["tau"].idxmin()]
    return Table(
        "definitions", "Does the definition matter?",
        "Kendall's τ between the orders of the rows: 1 is the same order, 0 none in common.",
        (Column("", align="left"), *(Column(name) for name in names)), rows, pairs,
        (
            f"Lowest: {worst['a']} and {worst['b']}, τ = {worst['tau']:.2f} over {worst['n']:.0f} "
            "rows. O is the leaderboard's.",
        ),
    )  # fmt: skip
