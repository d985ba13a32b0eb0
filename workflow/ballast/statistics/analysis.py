"""Everything that tables, pages and commands say about the rows of one base and target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ballast.results import Results
from ballast.statistics import notes, power, stability
from ballast.statistics.adjust import benjamini_hochberg, holm
from ballast.statistics.crossed import Differences, differences, prior_of_rows
from ballast.statistics.front import Box, Front, front
from ballast.statistics.points import COMPARED, Quantity, compared
from ballast.statistics.ranks import rank_spans
from ballast.statistics.rows import Rows, control_of, frame_of, points_tasks, rows_of
from ballast.statistics.seeds import LEVEL

__all__ = ["COMPARED", "LEVEL", "Analysis", "analyse"]


@dataclass(frozen=True)
class Analysis:
    """The rows of one base and target, and what is known of their differences.

    rows: one row per method x rank x variant, in the order of the tidy table, indexed by its key
    (`lora-r8+dropped`: as a suite names parents). Columns: method, title, family, variant, rank
    (Int64), n_ok, n_planned, seeds (tuple of the seeds that are ok), note (why others are not);
    for every quantity Q that the tidy table has a number of (measures, scores, losses, costs,
    drift): Q (mean over the seeds that are ok), `Q.sd`, `Q.low`, `Q.high` (t interval over seeds;
    missing with one seed); for Q of COMPARED:
      `Q.diff`, `Q.diff_low`, `Q.diff_high`  mean and interval of the difference to the control,
          paired by seed; `Q.p` of the test paired by seed and item, `Q.p_adjusted` (Holm)
      `Q.p_base`, `Q.p_base_adjusted`  the same against the untouched base
      `Q.rank_low`, `Q.rank_high` (Int64)  ranks that the row may hold, 1 is best; missing with one
          seed
      `front`  share of bootstrap draws in which the row is on the front of F and E
    Where a row and the control have items, the interval of the difference is that of the test:
    paired by seed and item (`crossed`). base.TASK and n.TASK, the same for all seeds, have a mean
    only.
    pairs: one row per pair of rows and Q of COMPARED: a, b (keys), quantity, difference (a - b),
      low, high, p, p_adjusted (all pairs of this table, Benjamini-Hochberg), n_seeds
    definitions: rank stability: one row per pair of definitions of "best" (a, b, tau, n): Kendall's
      tau between the orders of the rows
    control: key of the control's row (LoRA), or None
    facts: seeds (most in a row), draws, and per Q of COMPARED: `Q.minimum_detectable` (difference
      of two rows that would be found with power 0.8, points), `Q.noise_floor` (A/A: what two
      runs of one row with other seeds differ by in 95 % of cases) and `Q.noise_pairs`;
      `Q.minimum_detectable_median` (from the median pair's variance, not the pooled); hypervolume,
      hypervolume_low, hypervolume_high (share of the possible: Target from the base's to 100,
      Source from 0 to 100); `Q.itemed` (rows that have the items of Q), `Q.based` (whether those of
      the base are known), doubles (cells left out, see `rows_of`). What is not known is None.
    notes: sentences for a table's foot, plain text
    """

    base: str
    target: str
    control: str | None
    rows: pd.DataFrame
    pairs: pd.DataFrame
    definitions: pd.DataFrame
    facts: dict[str, Any]
    notes: tuple[str, ...]


def analyse(results: Results, base: str, target: str, control: str = "lora") -> Analysis:
    """Analyse the rows of a base and target; control: a method or a row's key.

    Cells that are `unplanned` are left out, and only those that are ok enter a number.
    """
    rows = rows_of(results.table, base, target)
    known = control_of(rows, control)
    quantities = compared(rows, results.items)
    tests = {name: _with_base(quantity) for name, quantity in quantities.items()}
    frame, pairs = frame_of(rows), _pairs(rows, tests)
    columns = [_compared_columns(rows, name, tests[name], pairs, known) for name in COMPARED]
    drawn = _front(rows, quantities)
    new = {key: value for found in columns for key, value in found.items()} | {"front": drawn.share}
    frame = pd.concat([frame, pd.DataFrame(new, index=frame.index)], axis=1)
    definitions = stability.agreement(stability.definitions(frame))
    facts = _facts(rows, quantities, tests, drawn)
    said = notes.sentences(frame, pairs, definitions, facts, known)
    return Analysis(base, target, known, frame.copy(), pairs, definitions, facts, said)


def _with_base(quantity: Quantity) -> Differences:
    """All rows against each other and, last, against the base as a row of zeros."""
    zeros = np.zeros((1, quantity.values.shape[1]))
    cubes = [(w, np.concatenate([x, np.zeros_like(x[:1])])) for w, x in quantity.cubes]
    itemed = np.append(quantity.itemed, quantity.based)
    values = np.concatenate([quantity.values, zeros])
    return differences(values, cubes, itemed, prior_of_rows(quantity.values))


def _pairs(rows: Rows, tests: dict[str, Differences]) -> pd.DataFrame:
    a, b = np.triu_indices(len(rows.keys), k=1)
    parts = []
    for at, name in enumerate(COMPARED):
        test = tests[name].part(a, b)
        p, half = test.p(), test.half()
        data = {
            "a": pd.Categorical.from_codes(a, categories=pd.Index(rows.keys, dtype=object)),
            "b": pd.Categorical.from_codes(b, categories=pd.Index(rows.keys, dtype=object)),
            "quantity": pd.Categorical.from_codes(np.full(len(a), at), categories=list(COMPARED)),
            "difference": test.mean, "low": test.mean - half, "high": test.mean + half,
            "p": p, "p_adjusted": benjamini_hochberg(p), "n_seeds": test.n,
        }  # fmt: skip
        parts.append(pd.DataFrame(data))
    return pd.concat(parts, ignore_index=True)


def _compared_columns(
    rows: Rows, name: str, test: Differences, pairs: pd.DataFrame, control: str | None
) -> dict[str, Any]:
    size = len(rows.keys)
    every, blank = np.arange(size), np.full(size, np.nan)
    found = dict.fromkeys(("diff", "diff_low", "diff_high", "p", "p_adjusted"), blank)
    if control is not None:
        at = rows.keys.index(control)
        other = test.part(every, np.full(size, at))
        columns = (other.mean, other.mean - other.half(), other.mean + other.half(), other.p())
        for key, values in zip(("diff", "diff_low", "diff_high", "p"), columns, strict=True):
            found[key] = np.where(every == at, np.nan, values)
        found["p_adjusted"] = holm(found["p"])
    found["p_base"] = test.part(every, np.full(size, size)).p()
    found["p_base_adjusted"] = holm(found["p_base"])
    low, high = _ranks(rows, name, pairs)
    found["rank_low"], found["rank_high"] = (pd.array(x, dtype="Int64") for x in (low, high))
    return {f"{name}.{key}": values for key, values in found.items()}


def _ranks(rows: Rows, name: str, pairs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    size = len(rows.keys)
    a, b = np.triu_indices(size, k=1)
    chosen = pairs[pairs["quantity"] == name]
    difference, p = np.zeros((size, size)), np.ones((size, size))
    difference[a, b], p[a, b] = chosen["difference"], chosen["p_adjusted"]
    difference[b, a], p[b, a] = -chosen["difference"], chosen["p_adjusted"]
    ranked = (~np.isnan(rows.values(name))).sum(axis=1) > 1
    return rank_spans(difference, p, ranked)


def _base_means(rows: Rows) -> tuple[float, float]:
    """Source and Target of the untouched base, points; NaN where it is not known."""
    ok = (rows.cells["status"] == "ok").to_numpy(bool)
    means = []
    for role in ("upstream", "target"):
        names = [f"base.{task}" for task in points_tasks(rows.cells, role)]
        means.append(float(rows.cells.loc[ok, names].mean().mean()) if names else np.nan)
    return means[0], means[1]


def _front(rows: Rows, quantities: dict[str, Quantity]) -> Front:
    source, target = _base_means(rows)
    box = Box(100 - target, -source, 100 - source)
    e, f = quantities["E"], quantities["F"]
    known = None if np.isnan([source, target]).any() else box
    return front(e.values, f.values, e.cubes, f.cubes, (e.itemed, f.itemed), known)


def _facts(
    rows: Rows, quantities: dict[str, Quantity], tests: dict[str, Differences], drawn: Front
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "seeds": int(rows.n_ok().max(initial=0)), "draws": drawn.draws,
        "hypervolume": drawn.hypervolume, "hypervolume_low": drawn.low,
        "hypervolume_high": drawn.high, "doubles": rows.doubles,
    }  # fmt: skip
    upper = np.triu_indices(len(rows.keys), k=1)
    for name in COMPARED:
        test = tests[name].part(*upper)
        floor, pairs = power.noise_floor(quantities[name].values)
        found[f"{name}.minimum_detectable"] = power.minimum_detectable(test)
        found[f"{name}.minimum_detectable_median"] = power.minimum_detectable(test, typical=True)
        found[f"{name}.noise_floor"], found[f"{name}.noise_pairs"] = floor, pairs
        found[f"{name}.lent"] = float(test.lent.max(initial=0.0))
        found[f"{name}.itemed"] = int(quantities[name].itemed.sum())
        found[f"{name}.based"] = quantities[name].based
    return found
