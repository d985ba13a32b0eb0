"""Everything that is made from a suite's results: tables, figures, pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ballast.figures.output import write_figures
from ballast.results import Results
from ballast.site import write_site
from ballast.tables.output import write_tables
from ballast.tables.summary import Place

# Beside the tables; without it the next run makes them again, even if a stale cell's file is put
# back.
COMPLETE = ".complete"


def write_tables_and_figures(
    results: Results, places: Sequence[Place], protocol: str | None, complete: bool = False
) -> list[Path]:
    """Write tables/ and figures/ of a suite's folder; returns their paths.

    places: of `places_of`; protocol: the published table to compare with; complete: whether every
    cell has run.
    """
    tables = results.folder / "tables"
    written = write_tables(results, tables, places, protocol)
    written += write_figures(places, results.folder / "figures")
    if complete:
        (tables / COMPLETE).touch()
    elif not results.table["status"].isin(["ok", "failed", "unplanned"]).all():
        (tables / COMPLETE).unlink(missing_ok=True)
    return written


def write_pages(results: Results, places: Sequence[Place], protocol: str | None) -> list[Path]:
    """Write leaderboard/index.html of a suite's folder and a page for each cell."""
    analyses = {(p.analysis.base, p.analysis.target): p.analysis for p in places}
    return write_site(results, analyses, results.folder / "leaderboard", protocol)
