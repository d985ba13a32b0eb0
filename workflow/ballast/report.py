"""Everything that is made from a suite's results: tables, figures, pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ballast.errors import DataError
from ballast.figures.output import write_figures
from ballast.files import SUMS, forget_sums, remove_parts, write_sums
from ballast.outcome import COMPLETE
from ballast.results import Results
from ballast.site import write_site
from ballast.tables.output import write_tables
from ballast.tables.summary import Place

FIGURES = "figures"


def write_tables_and_figures(
    results: Results, places: Sequence[Place], protocol: str | None, complete: bool = False
) -> list[Path]:
    """Write tables/ and figures/ of a suite's folder; returns their paths.

    places: of `places_of`; protocol: the published table to compare with; complete: whether every
    cell has run. Raises DataError if one has not.
    """
    tables = results.folder / "tables"
    with _marked(results, tables, complete):
        written = write_tables(results, tables, places, protocol)
        written += write_figures(places, results.folder / FIGURES)
        write_sums(results.folder, written, f"tables/{SUMS}")
        return written


def write_pages(
    results: Results, places: Sequence[Place], protocol: str | None, complete: bool = False
) -> list[Path]:
    """Write leaderboard/index.html of a suite's folder and a page for each cell; see above."""
    folder = results.folder / "leaderboard"
    analyses = {(p.analysis.base, p.analysis.target): p.analysis for p in places}
    with _marked(results, folder, complete):
        written = write_site(results, analyses, folder, protocol)
        write_sums(results.folder, written, f"leaderboard/{SUMS}")
        return written


@contextmanager
def _marked(results: Results, folder: Path, complete: bool) -> Iterator[None]:
    """Leave a mark in a folder whose contents were written whole, from the records of all cells.

    Without it the next run makes them again, even if nothing else tells that they are old.
    """
    done = results.table["status"].isin(["ok", "failed", "unplanned"])
    if complete and not done.all():
        cell = results.table.loc[~done].iloc[0]
        raise DataError(
            f"{cell['id']}: {cell['status']} when all cells had run; does another run work in "
            "this folder? Run again"
        )
    mark = folder / COMPLETE
    whole = complete or (mark.exists() and done.all())
    mark.unlink(missing_ok=True)
    for written in (folder, results.folder / FIGURES):
        remove_parts(written)
    forget_sums(folder)
    yield
    if whole:
        mark.touch()
