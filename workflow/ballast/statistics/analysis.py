"""Everything that tables, pages and commands say about the rows of one base and target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from ballast.results import Results

# Quantities in points that rows are compared and ranked by.
COMPARED = ("E", "F", "O")
LEVEL = 0.95


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
    pairs: one row per pair of rows and Q of COMPARED: a, b (keys), quantity, difference (a - b),
      low, high, p, p_adjusted (all pairs of this table, Benjamini-Hochberg), n_seeds
    definitions: rank stability: one row per pair of definitions of "best" (a, b, tau, n): Kendall's
      tau between the orders of the rows
    control: key of the control's row (LoRA), or None
    facts: seeds (most in a row), draws, and per Q of COMPARED: `Q.minimum_detectable` (difference
      of two rows that would be found with power 0.8, points), `Q.noise_floor` (A/A: what two
      runs of one row with other seeds differ by in 95 % of cases) and `Q.noise_pairs`; hypervolume,
      hypervolume_low, hypervolume_high (share of the possible)
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
    """Analyse the rows of a base and target; control: a method or a row's key."""
    raise NotImplementedError
