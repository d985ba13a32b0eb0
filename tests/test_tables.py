"""Tables and plots from records: what enters a mean, what is marked; nothing breaks them."""

from __future__ import annotations

import csv
import math
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast import escape, plots, render, summary, tables
from fake_records import failed, plan_of, record

HOSTILE = (
    '=cmd|" /C calc"!A0', "<script>alert(1)</script>", "a|b\n| c |", "`code` **bold** [x](http://x.y)",
    r"\input{/etc/passwd} $x^2$ & %#_~", 'quote " and, comma', "\x1b[31mred\x00", "+1", "日本 🎉 é",
    "[1em]", "*",
)  # fmt: skip


def seeds(method: str, e: list[float], f: list[float], **other: Any) -> list[dict[str, Any]]:
    values = zip(e, f, strict=True)
    return [record(method, seed, e=a, f=b, **other) for seed, (a, b) in enumerate(values)]


def one_table(records: list[dict], plan: pd.DataFrame | None = None) -> pd.DataFrame:
    return next(iter(tables.tradeoff_tables(tables.tidy(records, plan)).values()))


def row_of(table: pd.DataFrame, title: str) -> pd.Series:
    return table[table["title"] == title].iloc[0]


def test_tidy_row() -> None:
    row = tables.tidy([record(e=50, f=-10)]).iloc[0]
    assert (row["E"], row["F"], row["O"]) == (50, -10, 40)
    assert (row["source_mean"], row["target_mean"], row["Avg"]) == (75, 60, 67.5)
    assert row["H"] == pytest.approx(2 * 75 * 60 / 135)
    assert row["score.facts"] == 80
    assert row["dce.facts"] == 0.5
    assert row["dce.tales"] == pytest.approx(0.1)  # positive: worse
    assert row["extra.tales.byte_perplexity"] == 2.5
    assert row["seconds.train"] == 1.5


def test_probes_and_losses_enter_no_mean() -> None:
    plain, moved = record(), record()
    moved["scores"]["wiki"]["value"] = 0.0
    moved["scores"]["tales"] = {"value": 99.0, "n": 3, "loss": 99.0}
    measures = list(tables.tradeoff.MEASURES)
    frames = [tables.tidy([item])[measures] for item in (plain, moved)]
    pd.testing.assert_frame_equal(*frames)
    columns = one_table([plain]).attrs["columns"]
    first = {item["key"] for item in columns if item["table"] == 1}
    second = {item["key"] for item in columns if item["table"] == 2}
    assert {"score.facts", "score.sums", "F", "E", "O"} <= first
    assert {"score.wiki", "score.tales", "dce.codes", "extra.tales.byte_perplexity"} <= second


def test_mean_and_sd_over_seeds() -> None:
    row = row_of(one_table(seeds("lora", [50, 52, 54], [-10, -10, -10])), "lora")
    assert (row["E"], row["E sd"], row["seeds"]) == (52, 2, "3/3")
    assert (row["F"], row["F sd"]) == (-10, 0)


def test_a_single_seed_has_no_sd_and_no_mark() -> None:
    found = [*seeds("lora", [50], [-10]), *seeds("dora", [20], [-30])]
    table = one_table(found)
    assert math.isnan(row_of(table, "lora")["E sd"])
    assert all((table[f"{item['key']} mark"] == "").all() for item in table.attrs["columns"])
    text = render.markdown(table)
    assert "Nothing is marked as better: no row has two seeds." in text
    assert "±" not in text.split("* E =")[0]
    assert "**" not in text


def test_a_single_seed_never_wins_against_rows_with_more() -> None:
    found = seeds("dora", [40, 41], [-10, -11]) + seeds("pissa", [20, 21], [-10, -11])
    table = one_table(found + seeds("lora", [80], [-1]))
    assert row_of(table, "lora")["E mark"] == ""
    assert row_of(table, "dora")["E mark"] == "best"
    assert row_of(table, "pissa")["E mark"] == "second"


def test_marks() -> None:
    # pooled sd 1, three seeds each: the error of a difference is 0.816
    sds, n = [1.0] * 5, [3] * 5
    assert summary.marks([10, 9.3, 8, 7.5, 1], sds, n, "higher") == [
        "best", "best", "second", "second", "",
    ]  # fmt: skip
    assert summary.marks([10, 9.3, 8, 7.5, 1], sds, n, "lower") == [
        "", "", "second", "second", "best",
    ]  # fmt: skip
    assert summary.marks([5, 5.1, 5.2, 5.3, 5.4], sds, n, "higher") == [""] * 5
    assert summary.marks([9, None, 5, math.nan, 1], sds, [3, 0, 3, 0, 3], "higher") == [
        "best", "", "second", "", "",
    ]  # fmt: skip
    assert summary.spans([10, 9.3, 8, 7.5, 1], sds, n) == ["1-2", "1-2", "3-4", "3-4", "5"]
    assert summary.spans([10, 9], [None, None], [1, 1]) == ["", ""]


MEANS = st.lists(st.floats(-100, 100), min_size=1, max_size=12)


@given(MEANS, st.floats(0, 20), st.data())
def test_marks_are_consistent(means: list[float], sd: float, data: st.DataObject) -> None:
    n = [data.draw(st.integers(1, 4)) for _ in means]
    found = summary.marks(means, [sd if m > 1 else None for m in n], n, "higher")
    marked = {
        m: [v for v, f in zip(means, found, strict=True) if f == m] for m in ("best", "second")
    }
    assert all(found[i] == "" for i in range(len(n)) if n[i] < 2)
    if marked["best"]:
        eligible = [v for v, m in zip(means, n, strict=True) if m > 1]
        assert max(eligible) == max(marked["best"])
        assert marked["second"]
        assert max(marked["second"]) <= max(marked["best"])


def test_failed_missing_and_stale_cells_are_shown_and_never_averaged() -> None:
    lora, dora = seeds("lora", [50, 52, 99], [-10, -10, -99]), seeds("dora", [40], [-5])
    stale, old = seeds("pissa", [1], [-1])[0], seeds("olora", [1], [-1])[0]
    plan = plan_of([*lora, *dora, stale, old])
    lora[2] = failed(lora[2])
    stale["keys"]["train"], old["keys"]["eval"] = "older", "older"
    gone = record("gone", e=99)
    found = [*lora, stale, old, gone]
    tidy = tables.tidy(found, plan)
    status = tidy.set_index("method")["status"]
    assert list(status["lora"]) == ["ok", "ok", "failed"]
    assert status[["dora", "pissa", "olora", "gone"]].tolist() == [
        "missing", "stale", "rescore", "unplanned",
    ]  # fmt: skip
    assert tidy.loc[tidy["status"] != "ok", ["E", "F", "O", "score.facts"]].isna().all(axis=None)
    table = one_table(found, plan)
    row = row_of(table, "lora")
    assert (row["E"], row["seeds"]) == (51, "2/3")
    assert row["note"] == "1 failed (diverged: loss is NaN)"
    assert row_of(table, "dora")["note"] == "1 missing"
    assert row_of(table, "pissa")["note"] == "1 stale"
    assert row_of(table, "olora")["note"] == "1 to be scored again"
    assert "gone" not in set(table["title"])
    assert pd.isna(row_of(table, "pissa")["E"])
    shown = tables.screen(found, plan, Path("results/tiny"))
    assert "7 cells: 2 done, 1 failed, 1 missing, 1 stale" in shown
    assert "lora r8: 1 failed (diverged: loss is NaN)" in shown
    assert "results/tiny" in shown
    assert "Of 6 cells, not averaged in: 1 failed, 1 missing, 1 stale" in render.markdown(table)


def test_zero_shot_row_is_first() -> None:
    row = one_table([record()]).iloc[0]
    assert (row["title"], row["source_mean"], row["target_mean"]) == ("Zero-shot", 85, 10)
    assert row["score.facts"] == 90
    assert row["Avg"] == 47.5
    assert row["extra.tales.byte_perplexity"] == 2.25


def test_records_that_disagree_on_the_base_are_named() -> None:
    found = seeds("lora", [50, 52], [-10, -10])
    found[1]["base_scores"]["facts"]["value"] = 80.0
    table = one_table(found)
    assert any(
        note.startswith("Caution: the records disagree") for note in table.attrs["footnotes"]
    )


def test_footnotes() -> None:
    found = [record("top_st", rank=None), record("lorasculpt"), record("dora")]
    found[0]["settings"]["hyper"] = {"layers": 2}
    found[1]["report"] = {"density": 0.125}
    found[2]["scored"] = "adapted"
    notes = "\n".join(one_table(found).attrs["footnotes"])
    assert "top_st layers = 2" in notes
    assert "lorasculpt r8 density 0.125" in notes
    assert "Scored weights: merged, except adapted: dora r8." in notes
    assert "Facts (upstream, acc, 300 items" in notes
    assert "no row was skipped" in notes


def test_titles_that_two_methods_share_are_told_apart() -> None:
    found = [record("lora", title="LoRA"), record("mine", title="LoRA")]
    assert set(one_table(found)["title"][1:]) == {"LoRA (lora)", "LoRA (mine)"}


def hostile() -> list[dict[str, Any]]:
    found = []
    for at, text in enumerate(HOSTILE):
        for seed in (0, 1):
            item = record(f"m{at}", seed, e=20 + at + seed, f=-at - seed, title=text, variant=text)
            item["id"] = f"cell{at}.s{seed}"
            found.append(item)
    found.append(failed(record("bad", title="<b>|&"), "raised", r"$\undefined | <i> =1+1"))
    return found


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    tables.write_tables(hostile(), None, tmp_path)
    markdown = (tmp_path / "tradeoff-micro-lm-codes.md").read_text()
    assert "<script" not in markdown
    assert "<b>" not in markdown
    block = [line for line in markdown.splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block}
    assert len(widths) == 2  # the two tables
    latex = (tmp_path / "tradeoff-micro-lm-codes.tex").read_text()
    assert r"\input{" not in latex
    assert r"\undefined" not in latex
    for path in tmp_path.glob("*.csv"):
        with path.open(newline="") as stream:
            rows = list(csv.reader(stream))
        assert len({len(row) for row in rows}) == 1
        for cell in (cell for row in rows for cell in row):
            assert not cell.startswith(("=", "@", "\t", "\r"))
            assert not re.match(r"[+-]", cell) or float(cell) < 0
            assert "\x00" not in cell
            assert "\x1b" not in cell
    assert "\x1b" not in tables.screen(hostile(), None)


@given(st.text(max_size=30))
def test_escapes(text: str) -> None:
    latex = escape.latex(text)
    bare = re.sub(r"\\[A-Za-z]+|\\[{}$&#_%]|\$\\?[A-Za-z]*-?\$|[{}]", "", latex)
    assert not set(bare) & set("\\$&#_%~^")
    assert "\n" not in escape.markdown(text)
    assert not re.search(r"<|(?<!\\)\|", escape.markdown(text).replace("\\\\", ""))
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,120}", escape.slug(text))


def test_csv_has_no_nan(tmp_path: Path) -> None:
    found = [record(), failed(record("dora"), reason="x"), record("full_st", rank=None)]
    tables.write_tables(found, None, tmp_path)
    for path in tmp_path.glob("*.csv"):
        assert not re.search(r"\b(nan|none|inf|nat|<na>)\b", path.read_text(), re.IGNORECASE)
    row = pd.read_csv(tmp_path / "cells.csv").set_index("method").loc["lora"]
    assert row["trainable_parameters"] == 8000
    assert row["E"] == 50
    back = pd.read_parquet(tmp_path / "cells.parquet")
    pd.testing.assert_frame_equal(back, tables.tidy(found), check_dtype=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    found = hostile() + seeds("lora", [50, 52, 54], [-10, -11, -12])
    plan = plan_of(found)
    mixed = found[:]
    random.Random(3).shuffle(mixed)
    mixed = [dict(reversed(list(item.items()))) for item in mixed]
    for folder, items in (("a", found), ("b", mixed)):
        tables.write_tables(items, plan, tmp_path / folder)
        plots.write_scatter(tables.tidy(items, plan), tmp_path / folder)
    one, two = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert sorted(one) == sorted(
        ["cells.csv", "cells.parquet", "leaderboard.md", "tradeoff.png", "tradeoff.svg"]
        + [f"tradeoff-micro-lm-codes.{kind}" for kind in ("csv", "md", "tex")]
    )
    assert one == two


def test_tables_of_targets_that_are_gone_are_removed(tmp_path: Path) -> None:
    (tmp_path / "tradeoff.svg").touch()
    tables.write_tables([record(), record(target="other")], None, tmp_path)
    assert (tmp_path / "tradeoff-micro-lm-other.md").exists()
    tables.write_tables([record()], None, tmp_path)
    assert not (tmp_path / "tradeoff-micro-lm-other.md").exists()
    assert (tmp_path / "tradeoff.svg").exists()


def test_names_that_would_meet_in_one_file(tmp_path: Path) -> None:
    found = [record(base="a-b", target="c"), record(base="a", target="b-c")]
    written = tables.write_tables(found, None, tmp_path)
    assert len([path for path in written if path.suffix == ".tex"]) == 2
    assert len(set(written)) == len(written) == 9


@pytest.mark.parametrize("with_plan", [True, False])
def test_nothing_yet(tmp_path: Path, with_plan: bool) -> None:
    plan = plan_of([record()]) if with_plan else None
    tables.write_tables([], plan, tmp_path)
    plots.write_scatter(tables.tidy([], plan), tmp_path)
    assert f"{int(with_plan)} cells: 0 done" in tables.screen([], plan)


def test_screen_fits_a_terminal() -> None:
    found = seeds("lora", [50, 52, 54], [-10, -10.5, -11], title="A method with a very long title")
    lines = tables.screen(found, None, Path("x")).splitlines()
    assert max(map(len, lines)) <= 112


def test_ranks_on_the_screen_are_by_o() -> None:
    found = seeds("low", [10, 11], [-30, -31]) + seeds("high", [50, 51], [-3, -4])
    found += [failed(record("broken"))]
    shown = tables.screen(found, None)
    order = [shown.index(f"  {name}") for name in ("Zero-shot", "high", "low", "broken")]
    assert order == sorted(order)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plots_have_no_dates(tmp_path: Path, kind: str) -> None:
    plots.write_scatter(tables.tidy(hostile()), tmp_path)
    data = (tmp_path / f"tradeoff.{kind}").read_bytes()
    assert b"Software" not in data
    assert b"dc:date" not in data
    assert b"<script" not in data


LATEX = r"""\documentclass{article}\usepackage[T1]{fontenc}\usepackage{booktabs,graphicx}
\begin{document}\input{table}\end{document}"""


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex is not installed")
def test_latex_compiles(tmp_path: Path) -> None:
    (table,) = tables.tradeoff_tables(tables.tidy(hostile())).values()
    (tmp_path / "table.tex").write_text(render.latex(table))
    (tmp_path / "main.tex").write_text(LATEX)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
