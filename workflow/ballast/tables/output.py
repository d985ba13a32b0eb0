"""Every table of a suite as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ballast import published
from ballast.escape import file_names, markdown
from ballast.files import replacing, write_text
from ballast.results import Results
from ballast.statistics.analysis import analyse
from ballast.tables import details, leaderboard, relative, render, summary
from ballast.tables.printed import Table
from ballast.tables.summary import Place


def places_of(results: Results, control: str = "lora") -> list[Place]:
    """Every base and target of a suite with its analysis, sorted."""
    return [
        Place(results, analyse(results, base, target, control)) for base, target in results.places()
    ]


def tables_of(place: Place) -> list[Table]:
    """Every table of a base and target that there are numbers for, the most wanted first."""
    found = [
        summary.tradeoff_table(place),
        summary.control_table(place),
        summary.scores_table(place),
        details.equal_table(place),
        *details.churn_tables(place),
        summary.losses_table(place),
        details.derived_table(place),
        details.drift_table(place),
        summary.costs_table(place),
        relative.relative_table(place),
        details.tuning_table(place),
        details.definitions_table(place),
    ]
    return [table for table in found if table is not None]


def write_tables(
    results: Results,
    folder: Path,
    places: Sequence[Place] | None = None,
    protocol: str | None = None,
) -> list[Path]:
    """Write every table into `folder`, each atomically; the same results give the same bytes.

    cells.parquet and cells.csv (the tidy table), leaderboard.md, for each base and target a page
    BASE-TARGET.md and a folder BASE-TARGET/ with each of its tables as .csv and .tex, and
    tables.tex, a document of all. What an earlier run left of other tables is removed. places: as
    of `places_of`, if they are known; protocol: a paper's, whose numbers stand beside ours. Returns
    the paths, sorted.
    """
    places = places_of(results) if places is None else places
    analyses = {(p.analysis.base, p.analysis.target): p.analysis for p in places}
    papers = published.blocks_of(results, protocol, analyses)
    names = file_names(analyses)
    written, parts = _write_cells(results, folder), []
    for place, (where, name) in zip(places, names.items(), strict=True):
        found = tables_of(place)
        texts = {t.name: (t.raw, render.latex(t, place.title)) for t in found}
        beside = [item for item in papers if (item.base, item.target) == where]
        for at, item in enumerate(beside, start=1):
            texts[f"published-{at}"] = published.plain(item), published.latex(item)
        written.append(folder / f"{name}.md")
        write_text(written[-1], page(place, found, beside))
        for kind, (raw, text) in texts.items():
            parts += [folder / name / f"{kind}.csv", folder / name / f"{kind}.tex"]
            write_text(parts[-2], render.to_csv(raw))
            write_text(parts[-1], text)
    pages = [f"{name}.md" for name in names.values()]
    written += [folder / "leaderboard.md", folder / "tables.tex"]
    write_text(written[-2], leaderboard.leaderboard(results, places, pages))
    inputs = [path.relative_to(folder).as_posix() for path in parts if path.suffix == ".tex"]
    write_text(written[-1], render.document(inputs))
    _remove_others(folder, {*written, *parts})
    return sorted([*written, *parts])


def _write_cells(results: Results, folder: Path) -> list[Path]:
    written = [folder / "cells.parquet", folder / "cells.csv"]
    with replacing(written[0]) as temporary:
        results.table.to_parquet(temporary, index=False, engine="pyarrow")
    write_text(written[1], render.to_csv(results.table.drop(columns="tasks")))
    return written


def page(place: Place, tables: Sequence[Table], papers: Sequence[published.SideBySide] = ()) -> str:
    """All tables of a base and target as one Markdown page."""
    parts = [render.markdown(table) for table in tables]
    parts += [published.markdown(item, "##") for item in papers]
    return "\n".join([f"# {markdown(place.title)}", "", *parts])


def _remove_others(folder: Path, kept: set[Path]) -> None:
    """Remove tables of an earlier run: pages, and files of bases and targets that are gone."""
    patterns = ("*.md", "tradeoff-*.csv", "tradeoff-*.tex", "*/*.csv", "*/*.tex")
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        if path not in kept:
            path.unlink()
    for path in folder.iterdir():
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
