"""A suite's own side of the comparison: its protocol, its rows, its tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ballast.layout import Layout
from ballast.published.comparison import KEY, NAMES, SideBySide, side_by_side
from ballast.published.data import read_published
from ballast.results import Results
from ballast.statistics.analysis import Analysis


def protocol_of(suite: str, folder: Path | None = None) -> str | None:
    """The protocol that the file of this suite in config/ names, or None."""
    folder = folder or Layout.here().root / "config"
    for path in sorted(folder.glob("*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(config, dict) and config.get("suite") == suite:
            return config.get("protocol")
    return None


def blocks_of(
    results: Results,
    protocol: str | None = None,
    analyses: Mapping[tuple[str, str], Analysis] | None = None,
) -> list[SideBySide]:
    """Every block of a suite that names a protocol; none for a suite without one.

    protocol: by default that of the suite's file (`protocol_of`). analyses: by (base, target); with
    them the noise of our order is told, without them not.
    """
    protocol = protocol or protocol_of(results.suite)
    if protocol is None:
        return []
    published, found = read_published(), []
    for base, target in results.places():
        cells = results.table[(results.table["base"] == base) & (results.table["target"] == target)]
        ours: Analysis | pd.DataFrame = (analyses or {}).get((base, target), rows_of(cells))
        facts = _facts(cells)
        found += side_by_side(ours, protocol, base, target, facts, published)
    return found


def rows_of(cells: pd.DataFrame) -> pd.DataFrame:
    """Means and standard deviations over the seeds that are ok, one row per method, variant, rank.

    Columns: method, variant, rank, n_ok, and every quantity Q in points with `Q.sd`.
    """
    good = cells[cells["status"] == "ok"]
    names = [n for n in good if n in NAMES or n.startswith("score.")]
    names = [n for n in names if good[n].notna().any()]
    groups = good.groupby(KEY, dropna=False, sort=False)
    rows = groups[names].mean()
    rows = rows.join(groups[names].std().add_suffix(".sd")).assign(n_ok=groups.size())
    return rows.reset_index()


def _facts(cells: pd.DataFrame) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for text in cells["tasks"].drop_duplicates():
        found = json.loads(text) | found
    return found
