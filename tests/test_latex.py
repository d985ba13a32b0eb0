"""LaTeX that compiles: every table there is, with names that try to break it."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from ballast.results import Results
from ballast.tables import output, render
from fake_results import fake_results
from test_tables import HOSTILE

needs_latex = pytest.mark.skipif(
    not shutil.which("pdflatex"), reason="pdflatex is not installed"
)  # fmt: skip
TABLES = {
    "tradeoff", "control", "scores", "equal", "churn", "churn-tasks", "losses", "derived", "drift",
    "costs", "tuning", "definitions",
}  # fmt: skip


def with_rates(results: Results) -> Results:
    """The results with learning rates tuned for their methods."""
    first = results.table.drop_duplicates(["method", "rank"])
    frame = first[["base", "target", "method", "variant", "rank"]].merge(
        pd.DataFrame({"learning_rate": [1e-4, 1e-3], "score": [20.0, 30.0]}), how="cross"
    )
    frame = frame.assign(seed=0, loss=1.0, status="ok", default=True, E=10.0, F=-5.0)
    return dataclasses.replace(results, rates=frame)


def compiled(folder: Path, name: str = "tables.tex") -> str:
    """The log of pdflatex, run twice so that references are known."""
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", name]
    for _ in range(2):
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        log = done.stdout.decode("utf-8", "replace")
        assert done.returncode == 0, log[-2000:]
    return log


@needs_latex
def test_every_table_compiles_with_hostile_names(tmp_path: Path) -> None:
    results = with_rates(fake_results(12, (2, 8), 2, 30, names=HOSTILE))
    output.write_tables(results, tmp_path)
    folder = tmp_path / "micro-lm-codes"
    assert {path.stem for path in folder.glob("*.tex")} == TABLES
    log = compiled(tmp_path)
    assert "multiply defined" not in log
    assert "Reference" not in log
    assert (tmp_path / "tables.pdf").stat().st_size > 20_000


@needs_latex
def test_a_long_table_goes_on_in_floats_that_fit_the_page(tmp_path: Path) -> None:
    results = fake_results(48, (2, 8), 2, 10)
    (place,) = output.places_of(results)
    table = next(t for t in output.tables_of(place) if t.name == "tradeoff")
    assert len(table.rows) > 2 * render.PAGE_ROWS
    text = render.latex(table, place.title)
    assert text.count(r"\begin{table*}") == 3
    assert text.count("(continued).") == 2
    assert len(re.findall(r"\\label\{", text)) == 1
    for row in table.rows[1:]:
        assert text.count(f"{row[0].text} & {row[1].text} & ") == 1
    (tmp_path / "one.tex").write_text(text)
    (tmp_path / "tables.tex").write_text(render.document(["one.tex"]))
    log = compiled(tmp_path)
    assert "Float too large" not in log
    assert "Overfull" not in log


@needs_latex
def test_nothing_yet_compiles(tmp_path: Path) -> None:
    (tmp_path / "tables.tex").write_text(render.document([]))
    compiled(tmp_path)


def test_marks_are_superscripts_with_a_note() -> None:
    (place,) = output.places_of(fake_results(5, (2, 8), 4, 60))
    table = next(t for t in output.tables_of(place) if t.name == "tradeoff")
    text = render.latex(table, place.title)
    marked = [mark for row in table.rows for cell in row for mark in cell.marks]
    assert marked
    body, notes = text.split(r"\begin{minipage}")
    for mark, command in (("better", "uparrow"), ("worse", "downarrow"), ("same", "circ")):
        assert body.count(rf"$^{{\{command}}}$") == marked.count(mark)
    assert r"$\uparrow$ better, $\downarrow$ worse than lora r2" in notes
    assert "Benjamini and Hochberg" in notes


def test_a_line_parts_families_and_the_untouched_base() -> None:
    (place,) = output.places_of(fake_results(6, (2, 8), 2, 10))
    table = next(t for t in output.tables_of(place) if t.name == "tradeoff")
    families = len({row["family"] for row in place.rows.values()})
    assert render.latex(table, place.title).count(r"\midrule") == 1 + families


def test_a_minus_is_a_minus() -> None:
    (place,) = output.places_of(fake_results(3, (2,), 2, 20))
    table = next(t for t in output.tables_of(place) if t.name == "tradeoff")
    body = render.latex(table, place.title).split(r"\midrule")[2]
    assert not re.search(r"[& \[]-\d", body)
    assert "{-}" not in body
