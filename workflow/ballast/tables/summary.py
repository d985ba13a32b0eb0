"""The tables of one base and target: trade-off, comparison with the control, scores, costs, losses.

Means, intervals, tests, ranks and ties come from `statistics.analyse`; nothing is decided here.
`details` has the tables beyond these.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import pandas as pd

from ballast import tradeoff
from ballast.results import Results
from ballast.statistics.analysis import COMPARED, LEVEL, Analysis
from ballast.tables import MEASURES, notes
from ballast.tables.printed import (
    DASH,
    Cell,
    Column,
    Table,
    absent,
    compact,
    figures,
    interval,
    number,
    p_value,
    ranks,
    share,
    spread,
)

DIFFERENCE = ("diff", "diff_low", "diff_high", "p", "p_adjusted", "p_base", "p_base_adjusted")
ROLES = ("upstream", "target", "probe")
# Of a row, even where no cell of the table is ok.
NEEDED = (*MEASURES, *(f"{key}.{name}" for key in COMPARED for name in DIFFERENCE))
IDENTITY = ("method", "title", "family", "variant", "rank", "n_ok", "n_planned", "note")
Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A base and target: its analysis, and the cells of the tidy table that belong to it."""

    results: Results
    analysis: Analysis

    @cached_property
    def cells(self) -> pd.DataFrame:
        """The planned cells; columns of tasks and measures that nothing here has are left out."""
        table = self.results.table
        here = (table["base"] == self.analysis.base) & (table["target"] == self.analysis.target)
        found = table[here & (table["status"] != "unplanned")]
        kept = [name for name in found if "." not in name or found[name].notna().any()]
        return found[kept]

    @cached_property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """What is known of the tasks, by role and name."""
        return task_facts(self.cells)

    @cached_property
    def rows(self) -> dict[str, Row]:
        """Rows of the analysis by key, with that `key` and a `name`: the title, and its name
        where two methods share one title."""
        frame = self.analysis.rows
        shared = frame.groupby("title")["method"].nunique()
        plain = frame.astype(object).where(frame.notna(), None)
        found = {}
        for key, row in zip(frame.index, plain.to_dict("records"), strict=True):
            title = str(row["title"])
            row["name"] = title if shared[title] == 1 else f"{title} ({row['method']})"
            row["key"] = str(key)
            row |= {name: None for name in NEEDED if name not in row}
            found[row["key"]] = row
        return found

    @cached_property
    def base(self) -> dict[str, float | None]:
        """The untouched base's value of each quantity that it has one of."""
        found: dict[str, float | None] = {}
        for name in self.tasks:
            found[f"score.{name}"] = _mean(self.cells.get(f"base.{name}"))
            found[f"dce.{name}"] = 0.0
        found |= {
            key.removeprefix("base_"): _mean(self.cells[key])
            for key in self.cells
            if key.startswith("base_extra.")
        }
        s, t = (self._mean_of(role) for role in ("upstream", "target"))
        found |= {"source_mean": s, "target_mean": t, "Avg": tradeoff.average(s, t)}
        return found | {"H": tradeoff.harmonic_mean(s, t)}

    def _mean_of(self, role: str) -> float | None:
        scores = {name: _mean(self.cells.get(f"base.{name}")) for name in self.points(role)}
        known = {name: value for name, value in scores.items() if value is not None}
        return tradeoff.source_mean(known)

    def points(self, role: str) -> list[str]:
        """Tasks of a role that are scored in points."""
        return [k for k, v in self.tasks.items() if v["role"] == role and v["unit"] == "points"]

    @property
    def title(self) -> str:
        return f"{self.analysis.base} tuned on {self.analysis.target}"


def task_facts(cells: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """What is known of the tasks of cells (rows of the tidy table), by role and name; cells that
    are ok are believed first."""
    ordered = cells.sort_values("status", key=lambda s: s != "ok", kind="stable")
    found: dict[str, dict[str, Any]] = {}
    for text in ordered["tasks"].drop_duplicates():
        for name, facts in json.loads(text).items():
            found.setdefault(name, facts)
    return dict(sorted(found.items(), key=lambda item: (ROLES.index(item[1]["role"]), item[0])))


def _mean(values: pd.Series | None) -> float | None:
    return None if values is None or values.isna().all() else fmean(values.dropna())


# What every table begins with.

METHOD = (Column("Method", align="left"), Column("r"), Column("Variant", align="left"))


def identity(row: Row) -> list[Cell]:
    """The first cells of a row: its method, rank and variant."""
    rank = "" if row["rank"] is None else str(int(row["rank"]))
    return [Cell(row["name"]), Cell(rank), Cell(row["variant"])]


def zero_shot(cells: Iterable[Cell]) -> list[Cell]:
    """The row of the untouched base."""
    return [Cell("Zero-shot"), Cell(), Cell(), *cells]


def family_rules(rows: Sequence[Row], offset: int = 0) -> frozenset[int]:
    """Rows after which another family begins; `offset` rows stand before them."""
    changes = [i for i in range(1, len(rows)) if rows[i]["family"] != rows[i - 1]["family"]]
    return frozenset({*range(offset), *(i - 1 + offset for i in changes)})


def raw_rows(place: Place, keys: Iterable[str], single: Iterable[str] = ()) -> pd.DataFrame:
    """Quantities of the analysis with their spreads and intervals, after what names the rows;
    `single` are columns that have none."""
    frame = place.analysis.rows
    wanted = [n for key in keys for n in (key, f"{key}.sd", f"{key}.low", f"{key}.high")]
    columns = [name for name in (*IDENTITY, *wanted, *single) if name in frame]
    return frame[columns].rename_axis("row").reset_index()


def by_row(
    place: Place, columns: Sequence[Column], cells: Callable[[Row], list[Cell]], **other: Any
) -> Table:
    """A table with a line for each row of the analysis, families apart.

    other: fields of Table, and `base`: the cells of the untouched base's line, which comes first.
    """
    base = other.pop("base", None)
    rows = list(place.rows.values())
    body = [] if base is None else [zero_shot(base)]
    body += [[*identity(row), *cells(row)] for row in rows]
    rules = family_rules(rows, 0 if base is None else 1)
    return Table(columns=(*METHOD, *columns), rows=body, rules=rules, **other)


def best_rows(place: Place, quantity: str) -> set[str]:
    """Rows that no other is found to be better than; nobody if that is every row."""
    lows = {key: row.get(f"{quantity}.rank_low") for key, row in place.rows.items()}
    low = {key: value for key, value in lows.items() if not absent(value)}
    best = {key for key, value in low.items() if value == 1}
    return set() if len(best) == len(low) else best


def marks_of(row: Row, quantity: str) -> tuple[str, ...]:
    """Superscripts of a difference: against the control, and not told from the base."""
    found = []
    against, base = row.get(f"{quantity}.p_adjusted"), row.get(f"{quantity}.p_base_adjusted")
    if not absent(against) and against < 1 - LEVEL:
        found.append("better" if row[f"{quantity}.diff"] > 0 else "worse")
    if not absent(base) and base >= 1 - LEVEL:
        found.append("same")
    return tuple(found)


def mean_cell(row: Row, key: str, digits: int = 2, signed: bool = False) -> Cell:
    """Mean over seeds and their standard deviation."""
    return Cell(number(row.get(key), digits, signed), spread(row.get(f"{key}.sd"), digits))


def tradeoff_table(place: Place) -> Table:
    """What was learned against what was forgotten: the first table of a base and target."""
    best = {key: best_rows(place, key) for key in COMPARED}
    means = {
        "F": ("Source", "source_mean", "Upstream"),
        "E": ("Target", "target_mean", "Downstream"),
    }
    columns = [Column("#", align="center")]
    for key, group in (("F", "Upstream"), ("E", "Downstream"), ("O", "Both")):
        columns += [Column(means[key][0], group)] if key in means else []
        columns += [Column(key, group), Column("95 %", group)]
    columns += [Column("Front", "Both"), Column("Seeds", align="center")]

    def line(row: Row) -> list[Cell]:
        found = [Cell(ranks(row))]
        for key in ("F", "E", "O"):
            found += [Cell(number(row[means[key][1]], 2))] if key in means else []
            cell = mean_cell(row, key, signed=True)
            found.append(cell._replace(marks=marks_of(row, key), strong=row["key"] in best[key]))
            found.append(Cell(interval(row.get(f"{key}.low"), row.get(f"{key}.high"))))
        return [*found, Cell(share(row.get("front"))), Cell(f"{row['n_ok']}/{row['n_planned']}")]

    s, t = (Cell(number(place.base[key], 2)) for key in ("source_mean", "target_mean"))
    dash = Cell(DASH)
    base = [Cell(), s, dash, dash, t, *[dash] * 5, Cell()]
    raw = raw_rows(place, ("source_mean", "F", "target_mean", "E", "O"), ("front", *RANKS))
    return by_row(
        place, columns, line, name="tradeoff", title="Trade-off", raw=raw, base=base,
        about="What was learned downstream (E) against what was forgotten upstream (F), in points.",
        notes=notes.tradeoff(place),
    )  # fmt: skip


RANKS = tuple(f"{key}.rank_{end}" for key in COMPARED for end in ("low", "high"))
TESTED = tuple(f"{key}.{name}" for key in COMPARED for name in DIFFERENCE)


def control_table(place: Place) -> Table | None:
    """Every row against the control; None without a control or anything to compare with it."""
    control = place.analysis.control
    frame = place.analysis.rows
    if control is None or len(frame) < 2:
        return None
    name = notes.row_name(place.rows[control])
    columns = [
        Column(header, title)
        for key, title in (("E", "Specialization E"), ("F", "Stability F"), ("O", "O = E + F"))
        for header in ("Δ", "95 %", "p", "Rank")
    ]

    def line(row: Row) -> list[Cell]:
        found = []
        for key in ("E", "F", "O"):
            is_control = row["key"] == control
            change = "control" if is_control else number(row[f"{key}.diff"], 2, signed=True)
            marks = () if is_control else tuple(m for m in marks_of(row, key) if m != "same")
            low, high = row[f"{key}.diff_low"], row[f"{key}.diff_high"]
            found += [
                Cell(change, marks=marks),
                Cell("" if is_control else interval(low, high)),
                Cell("" if is_control else p_value(row[f"{key}.p_adjusted"])),
                Cell(ranks(row, key)),
            ]
        return found

    return by_row(
        place, columns, line, name="control", title=f"Against {name}",
        about=f"Difference to {name} in points, its interval and adjusted p value, and the ranks "
        "that the row may hold.",
        raw=raw_rows(place, (), (*TESTED, *RANKS)), notes=notes.control(place),
    )  # fmt: skip


def scores_table(place: Place) -> Table:
    """Scores of every task in points, and the means of them that papers report."""
    upstream, target = place.points("upstream"), place.points("target")
    shown = [(f"score.{k}", place.tasks[k]["title"], "Upstream") for k in upstream]
    shown += [("source_mean", "Source", "Upstream")]
    if len(target) > 1:
        shown += [(f"score.{k}", place.tasks[k]["title"], "Downstream") for k in target]
    shown += [("target_mean", "Target", "Downstream"), ("Avg", "Avg", "Both"), ("H", "H", "Both")]
    return by_row(
        place, [Column(header, group) for _, header, group in shown],
        lambda row: [mean_cell(row, key) for key, _, _ in shown],
        name="scores", title="Scores by task",
        about="Scores in points (0 to 100, higher is better), mean ± sd over seeds.",
        base=[Cell(number(place.base.get(key), 2)) for key, _, _ in shown],
        raw=raw_rows(place, [key for key, _, _ in shown]), notes=notes.scores(place),
    )  # fmt: skip


COSTS = (
    ("trainable_parameters", "Trainable", compact),
    ("adapter_bytes", "Adapter B", compact),
    ("seconds.train", "Train s", lambda value: number(value, 1)),
    ("step_ms", "Step ms", lambda value: number(value, 1)),
    ("memory_mb.train", "Memory MB", lambda value: number(value, 0)),
    ("seconds.evaluate", "Evaluate s", lambda value: number(value, 1)),
)


def costs_table(place: Place) -> Table:
    """What each row cost, with which learning rate, and how its cells stand."""
    rates: dict[tuple[Any, ...], list[float]] = {}
    known = place.cells[place.cells["learning_rate"].notna()]
    names = ["method", "variant", "rank", "learning_rate"]
    for method, variant, rank, rate in known[names].itertuples(index=False, name=None):
        key = (method, variant, None if pd.isna(rank) else int(rank))
        rates.setdefault(key, []).append(rate)

    def line(row: Row) -> list[Cell]:
        key = (row["method"], row["variant"], None if row["rank"] is None else int(row["rank"]))
        rate = " / ".join(figures(value) for value in sorted(set(rates.get(key, []))))
        found = [Cell(show(row.get(cost))) for cost, _, show in COSTS]
        return [*found, Cell(rate), Cell(f"{row['n_ok']}/{row['n_planned']}"), Cell(row["note"])]

    columns = [Column(header, "Cost") for _, header, _ in COSTS]
    columns += [
        Column("Learning rate"),
        Column("Seeds", align="center"),
        Column("Status", align="left"),
    ]
    return by_row(
        place, columns, line, name="costs", title="Cost and status",
        about="Means over the seeds that are ok; counts are measured, not nominal.",
        raw=raw_rows(place, [key for key, _, _ in COSTS]), notes=notes.costs(place),
    )  # fmt: skip


def losses_table(place: Place) -> Table | None:
    """Losses, and whatever is a probe or has a scale of its own; None if there is nothing."""
    shown = [*_loss_columns(place), *_own_scales(place)]
    if not shown:
        return None
    return by_row(
        place, [Column(header, group) for _, header, group, _, _ in shown],
        lambda row: [mean_cell(row, key, digits, sign) for key, _, _, digits, sign in shown],
        name="losses", title="Losses and probes",
        about="Never averaged with points.",
        base=[Cell(number(place.base.get(key), digits)) for key, _, _, digits, _ in shown],
        raw=raw_rows(place, [key for key, *_ in shown]), notes=notes.losses(place),
    )  # fmt: skip


Shown = tuple[str, str, str, int, bool]  # key, header, group, digits, signed


def _loss_columns(place: Place) -> list[Shown]:
    return [
        (f"dce.{name}", facts["title"], "ΔCE, nats per token", 3, True)
        for name, facts in place.tasks.items()
        if f"dce.{name}" in place.cells
    ]


def _own_scales(place: Place) -> list[Shown]:
    units = {"points": "points", "nats": "nats per token", "perplexity": "perplexity"}
    found: list[Shown] = []
    for name, facts in place.tasks.items():
        if facts["role"] == "probe" or facts["unit"] != "points":
            header = f"{facts['title']} ({facts['metric']}, {units[facts['unit']]})"
            digits = 2 if facts["unit"] == "points" else 3
            found.append((f"score.{name}", header, "Own scales", digits, False))
        for key in sorted(k for k in place.cells if k.startswith(f"extra.{name}.")):
            extra = key.removeprefix(f"extra.{name}.")
            unit = ", %" if extra == "answered" else ""
            header = f"{facts['title']} ({extra.replace('_', ' ')}{unit})"
            digits = 3 if extra.endswith("perplexity") else 2
            found.append((key, header, "Own scales", digits, False))
    return found
