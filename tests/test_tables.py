"""Tables from records: what enters a mean, what is marked; no text breaks them."""

from __future__ import annotations

import csv
import math
import random
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ballast import escape, tables
from ballast.results import ITEM_COLUMNS, Results
from ballast.tables import details, leaderboard, output, printed, render, summary
from ballast.tables.summary import Place
from fake_records import failed, plan_of, record
from fake_results import fake_results

HOSTILE = (
    '=cmd|" /C calc"!A0', "<script>alert(1)</script>", "a|b\n| c |", "`code` **bold** [x](http://x.y)",
    r"\input{/etc/passwd} $x^2$ & %#_~", 'quote " and, comma', "\x1b[31mred\x00", "+1", "日本 🎉 é",
    "[1em]", "*",
)  # fmt: skip


def results_of(records: list[dict[str, Any]], plan: pd.DataFrame | None = None) -> Results:
    return Results(
        suite="tiny",
        table=tables.tidy(records, plan),
        records={item["id"]: item for item in records},
        items=pd.DataFrame(columns=ITEM_COLUMNS),
    )


def place_of(records: list[dict[str, Any]], plan: pd.DataFrame | None = None) -> Place:
    return output.places_of(results_of(records, plan))[0]


def cells_of(table: printed.Table, title: str) -> dict[str, printed.Cell]:
    """The cells of a row by header; columns that share a header keep the first."""
    row = next(row for row in table.rows if title in (cell.text for cell in row))
    found: dict[str, printed.Cell] = {}
    for column, cell in zip(table.columns, row, strict=True):
        found.setdefault(column.header, cell)
    return found


def seeds(method: str, e: list[float], f: list[float], **other: Any) -> list[dict[str, Any]]:
    values = zip(e, f, strict=True)
    return [record(method, seed, e=a, f=b, **other) for seed, (a, b) in enumerate(values)]


def test_tidy_row() -> None:
    row = tables.tidy([record(e=50, f=-10)]).iloc[0]
    assert (row["E"], row["F"], row["O"]) == (50, -10, 40)
    assert (row["source_mean"], row["target_mean"], row["Avg"]) == (75, 60, 67.5)
    assert row["H"] == pytest.approx(2 * 75 * 60 / 135)
    assert row["retention"] == pytest.approx(100 * 75 / 85)
    assert row["forgetting_per_gain"] == pytest.approx(10 / 50)
    assert row["headroom_gain"] == pytest.approx(100 * 50 / 90)
    assert row["cgm_average"] == pytest.approx((60 + 2 * 75) / 3)
    assert row["score.facts"] == 80
    assert row["dce.facts"] == 0.5
    assert row["dce.tales"] == pytest.approx(0.1)  # positive: worse
    assert row["extra.tales.byte_perplexity"] == 2.5
    assert row["seconds.train"] == 1.5


def test_probes_and_losses_enter_no_mean() -> None:
    plain, moved = record(), record()
    moved["scores"]["wiki"]["value"] = 0.0
    moved["scores"]["tales"] = {"value": 99.0, "n": 3, "loss": 99.0}
    measures = list(tables.MEASURES)
    frames = [tables.tidy([item])[measures] for item in (plain, moved)]
    pd.testing.assert_frame_equal(*frames)
    place = place_of([plain])
    scores = {column.header for column in summary.scores_table(place).columns}
    losses = summary.losses_table(place)
    assert losses is not None
    assert {"Facts", "Sums", "Source"} <= scores
    assert not {"Wiki", "Tales"} & scores
    others = {column.header for column in losses.columns}
    assert {"Wiki (acc, points)", "Tales (ce, nats per token)", "Codes"} <= others
    assert "Tales (byte perplexity)" in others


def test_mean_sd_and_interval_over_seeds() -> None:
    row = cells_of(
        summary.tradeoff_table(place_of(seeds("lora", [50, 52, 54], [-9, -9, -9]))), "lora"
    )
    assert (row["E"].text, row["E"].small, row["Seeds"].text) == ("+52.00", "± 2.00", "3/3")
    assert (row["F"].text, row["F"].small) == ("-9.00", "± 0.00")
    table = summary.tradeoff_table(place_of(seeds("lora", [50, 52, 54], [-9, -9, -9])))
    low, high = table.raw.loc[0, ["E.low", "E.high"]]
    assert (low, high) == pytest.approx((52 - 4.968275, 52 + 4.968275))  # t(2) 4.3027, sd 2
    assert printed.interval(low, high) in {cell.text for cell in table.rows[1]}


def test_a_single_seed_has_no_spread_no_interval_no_rank_no_mark() -> None:
    found = [*seeds("lora", [50], [-10]), *seeds("dora", [20], [-30])]
    place = place_of(found)
    table = summary.tradeoff_table(place)
    for row in table.rows:
        assert not any(cell.small or cell.marks or cell.strong or "[" in cell.text for cell in row)
    assert cells_of(table, "lora")["#"].text == ""
    text = render.markdown(table)
    assert "Nothing is ranked or marked as better: no row has two seeds." in text
    assert "**" not in text


def test_a_single_seed_never_wins_against_rows_with_more() -> None:
    found = seeds("dora", [40, 41, 42], [-10, -10, -10.5]) + seeds(
        "lora", [5, 6, 7], [-30, -31, -30]
    )
    table = summary.tradeoff_table(place_of(found + seeds("pissa", [80], [-1])))
    single, best, worst = (cells_of(table, name) for name in ("pissa", "dora", "lora"))
    assert (single["#"].text, single["E"].strong) == ("", False)
    assert (best["#"].text, best["E"].strong, best["E"].marks) == ("1", True, ("better",))
    assert (worst["#"].text, worst["E"].strong) == ("2", False)


def test_marks_say_what_the_tests_say() -> None:
    place = output.places_of(fake_results(5, (2, 8), 4, 60))[0]
    frame = place.analysis.rows
    table = summary.tradeoff_table(place)
    for at, (key, row) in enumerate(frame.iterrows()):
        for quantity in ("F", "E", "O"):
            column = [c.header for c in table.columns].index(quantity)
            cell = table.rows[at + 1][column]
            p, base = row[f"{quantity}.p_adjusted"], row[f"{quantity}.p_base_adjusted"]
            sign = "better" if row[f"{quantity}.diff"] > 0 else "worse"
            told = {sign} if key != place.analysis.control and p < 0.05 else set()
            assert set(cell.marks) == told | ({"same"} if base >= 0.05 else set())
            lows = frame[f"{quantity}.rank_low"]
            assert cell.strong == (row[f"{quantity}.rank_low"] == 1 and not (lows == 1).all())
    control = summary.control_table(place)
    assert control is not None
    assert cells_of(control, "lora")["Δ"].text  # the control's other rank is compared with it
    assert any(cell.text == "control" for row in control.rows for cell in row)


def test_no_control_no_comparison() -> None:
    assert summary.control_table(place_of(seeds("dora", [1, 2], [-1, -2]))) is None
    assert summary.control_table(place_of(seeds("lora", [1, 2], [-1, -2]))) is None


def test_failed_missing_and_stale_cells_are_shown_and_never_averaged() -> None:
    lora, dora = seeds("lora", [50, 52, 99], [-10, -10, -99]), seeds("dora", [40], [-5])
    stale, old = seeds("pissa", [1], [-1])[0], seeds("olora", [1], [-1])[0]
    plan = plan_of([*lora, *dora, stale, old])
    lora[2] = failed(lora[2])
    stale["keys"]["train"], old["keys"]["eval"] = "older", "older"
    gone = record("gone", e=99)
    results = results_of([*lora, stale, old, gone], plan)
    status = results.table.set_index("method")["status"]
    assert list(status["lora"]) == ["ok", "ok", "failed"]
    assert status[["dora", "pissa", "olora", "gone"]].tolist() == [
        "missing", "stale", "rescore", "unplanned",
    ]  # fmt: skip
    measured = ["E", "F", "O", "retention", "score.facts"]
    bad = results.table.loc[results.table["status"] != "ok", measured]
    assert bad.isna().all(axis=None)
    (place,) = output.places_of(results)
    table, costs = summary.tradeoff_table(place), summary.costs_table(place)
    assert (cells_of(table, "lora")["E"].text, cells_of(table, "lora")["Seeds"].text) == (
        "+51.00", "2/3",
    )  # fmt: skip
    assert cells_of(costs, "lora")["Status"].text == "1 failed (diverged: loss is NaN)"
    assert cells_of(costs, "dora")["Status"].text == "1 missing"
    assert cells_of(costs, "pissa")["Status"].text == "1 stale"
    assert cells_of(costs, "olora")["Status"].text == "1 to be scored again"
    assert "gone" not in {row["title"] for row in place.rows.values()}
    assert cells_of(table, "pissa")["E"].text == printed.DASH
    shown = leaderboard.screen(results, [place], Path("results/tiny"))
    assert "7 cells: 2 done, 1 failed, 1 missing, 1 stale" in shown
    assert "lora r8: 1 failed (diverged: loss is NaN)" in shown
    assert "results/tiny" in shown
    assert "Of 6 cells, not averaged in: 1 failed, 1 missing, 1 stale" in render.markdown(table)


def test_zero_shot_row_is_first() -> None:
    place = place_of([record()])
    scores, losses = summary.scores_table(place), summary.losses_table(place)
    assert losses is not None
    first = {c.header: cell.text for c, cell in zip(scores.columns, scores.rows[0], strict=True)}
    assert (first["Method"], first["Source"], first["Target"]) == ("Zero-shot", "85.00", "10.00")
    assert (first["Facts"], first["Avg"]) == ("90.00", "47.50")
    below = {c.header: cell.text for c, cell in zip(losses.columns, losses.rows[0], strict=True)}
    assert below["Tales (byte perplexity)"] == "2.250"


def test_records_that_disagree_on_the_base_are_named() -> None:
    found = seeds("lora", [50, 52], [-10, -10])
    found[1]["base_scores"]["facts"]["value"] = 80.0
    notes = summary.scores_table(place_of(found)).notes
    assert any(note.startswith("Caution: the records disagree") for note in notes)


def test_notes() -> None:
    found = [record("top_st", rank=None), record("lorasculpt"), record("dora")]
    found[0]["settings"]["hyper"] = {"layers": 2}
    found[1]["report"] = {"density": 0.125}
    found[2]["scored"] = "adapted"
    place = place_of(found)
    costs = "\n".join(summary.costs_table(place).notes)
    assert "top_st layers = 2" in costs
    assert "lorasculpt r8 density 0.125" in costs
    assert "Scored weights: merged, except adapted: dora r8." in costs
    assert "Facts (upstream, acc, 300 items" in "\n".join(summary.scores_table(place).notes)
    assert "none was left out" in "\n".join(summary.tradeoff_table(place).notes)


def test_the_noise_stands_below_the_first_table_and_the_leaderboard() -> None:
    results = fake_results(4, (2, 8), 3, 40)
    places = output.places_of(results)
    notes = "\n".join(summary.tradeoff_table(places[0]).notes)
    floor = places[0].analysis.facts["E.noise_floor"]
    assert "power 0.8" in notes
    assert f"E {floor:.1f}" in notes
    board = leaderboard.leaderboard(results, places, ["x.md"])
    assert f"A/A noise floor: E {floor:.1f}" in board


def test_titles_that_two_methods_share_are_told_apart() -> None:
    found = [record("lora", title="LoRA"), record("mine", title="LoRA")]
    names = {row["name"] for row in place_of(found).rows.values()}
    assert names == {"LoRA (lora)", "LoRA (mine)"}


def test_churn_adds_up() -> None:
    results = fake_results(4, (2, 8), 3, 40)
    (place,) = output.places_of(results)
    counts = details.churn_counts(place)
    parts = counts[["kept", "gained", "forgotten", "never"]].sum(axis=1)
    assert (parts == counts["n"]).all()
    assert (counts["n"] == 3 * 40).all()
    pooled, by_task = details.churn_tables(place)
    for row in pooled.rows:
        assert sum(float(cell.text) for cell in row[4:8]) == pytest.approx(100, abs=0.25)
    key = next(iter(place.rows))
    mine = counts[(counts["row"] == key) & (counts["task"] == "facts")].iloc[0]
    share = 100 * mine["forgotten"] / mine["n"]
    assert by_task.rows[0][3].text.startswith(f"{share:.1f} / ")
    # F is what was gained less what was forgotten, over the tasks.
    both = counts[(counts["row"] == key) & (counts["task"] != "codes")]
    change = (100 * (both["gained"] - both["forgotten"]) / both["n"]).mean()
    assert change == pytest.approx(place.rows[key]["F"])


def test_churn_by_subject() -> None:
    found = record()
    block = {"n": 4, "kept": 2, "gained": 0, "forgotten": 1, "never": 1}
    found["churn"] = {"facts": block | {"subjects": {"a|b": block, "c": block}}}
    titles = [table.name for table in details.churn_tables(place_of([found]))]
    assert titles == ["churn", "churn-tasks", "churn-subjects"]
    table = details.churn_tables(place_of([found]))[2]
    assert [column.header for column in table.columns[3:]] == ["a|b", "c"]
    assert table.rows[0][3].text == "25.0 / 0.0"
    # Items of a subject are items of the task, not further ones.
    assert details.churn_tables(place_of([found]))[0].rows[0][3].text == "4"
    # Records made before forms were known have no share of them.
    assert {cell.text for cell in details.churn_tables(place_of([found]))[0].rows[0][-2:]} == {"–"}


def test_equal_specialization_stands_beside_the_end_points() -> None:
    (place,) = output.places_of(fake_results(4, (2, 8), 3, 40))
    table = details.equal_table(place)
    assert table is not None
    assert [column.group for column in table.columns[3:5]] == ["End point"] * 2
    assert any(column.group.startswith("At E = ") for column in table.columns)
    levels = [name for name in table.raw if name.startswith("F@") and name.count(".") == 0]
    assert levels
    assert details.equal_table(place_of([record()])) is None


def test_definitions_are_compared() -> None:
    (place,) = output.places_of(fake_results(6, (2, 8), 3, 40))
    table = details.definitions_table(place)
    assert table is not None
    names = [column.header for column in table.columns[1:]]
    at = {name: i for i, name in enumerate(names)}
    for a, b, tau in table.raw[["a", "b", "tau"]].itertuples(index=False):
        assert table.rows[at[a]][at[b] + 1].text == printed.number(tau, 2)
        assert table.rows[at[b]][at[a] + 1].text == printed.number(tau, 2)


def test_tuned_and_default_rates() -> None:
    keys = {"base": "micro-lm", "target": "codes", "method": "lora", "variant": "", "rank": 8}
    frame = pd.DataFrame(
        [
            keys | {"learning_rate": rate, "seed": 0, "score": score, "loss": 1.0, "status": "ok"}
            | {"default": rate == 1e-3, "E": score - 10, "F": -5.0}
            for rate, score in ((1e-4, 20.0), (1e-3, 30.0), (1e-2, 40.0))
        ]
    )  # fmt: skip
    frame["rank"] = frame["rank"].astype("Int64")
    results = results_of(seeds("lora", [1, 2], [-1, -1]))
    (place,) = output.places_of(Results(**(vars(results) | {"rates": frame})))
    table = details.tuning_table(place)
    assert table is not None
    texts = [cell.text for cell in table.rows[0]]
    assert texts[3:9] == ["0.001", "0.01", "30.00", "40.00", "+10.00", "10.00"]
    assert table.rows[0][4].marks == ("edge",)
    assert details.tuning_table(place_of([record()])) is None


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
    results = results_of(hostile())
    places = output.places_of(results)
    output.write_tables(results, tmp_path, places)
    for path in tmp_path.glob("*.md"):
        markdown = path.read_text()
        assert "<script" not in markdown
        assert "<b>" not in markdown
        for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
            widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
            assert len(widths) == 1
    sources = list(tmp_path.glob("*/*.tex"))
    assert len(sources) >= 4
    for path in sources:
        latex = path.read_text()
        assert r"\input{" not in latex
        assert r"\undefined" not in latex
    for path in [*tmp_path.glob("*.csv"), *tmp_path.glob("*/*.csv")]:
        with path.open(newline="") as stream:
            rows = list(csv.reader(stream))
        assert len({len(row) for row in rows}) == 1
        for cell in (cell for row in rows for cell in row):
            assert not cell.startswith(("=", "@", "\t", "\r"))
            assert not re.match(r"[+-]", cell) or float(cell) < 0
            assert "\x00" not in cell
            assert "\x1b" not in cell
    assert "\x1b" not in leaderboard.screen(results, places)


@given(st.text(max_size=30))
def test_escapes(text: str) -> None:
    latex = escape.latex(text)
    bare = re.sub(r"\\[A-Za-z]+|\\[{}$&#_%|]|\$[_^]?\\?[A-Za-z|]*-?\$|[{}]", "", latex)
    assert not set(bare) & set("\\$&#_%~^")
    assert "\n" not in escape.markdown(text)
    assert not re.search(r"<|(?<!\\)\|", escape.markdown(text).replace("\\\\", ""))
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,120}", escape.slug(text))


def test_csv_has_no_nan(tmp_path: Path) -> None:
    found = [record(), failed(record("dora"), reason="x"), record("full_st", rank=None)]
    output.write_tables(results_of(found), tmp_path)
    for path in [*tmp_path.glob("*.csv"), *tmp_path.glob("*/*.csv")]:
        assert not re.search(r"\b(nan|none|inf|nat|<na>)\b", path.read_text(), re.IGNORECASE)
    row = pd.read_csv(tmp_path / "cells.csv").set_index("method").loc["lora"]
    assert row["trainable_parameters"] == 8000
    assert row["E"] == 50
    back = pd.read_parquet(tmp_path / "cells.parquet")
    pd.testing.assert_frame_equal(back, tables.tidy(found), check_dtype=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    found = hostile() + seeds("lora", [50, 52, 54], [-10, -11, -12])
    plan = plan_of(found)
    mixed = found[:]
    random.Random(3).shuffle(mixed)
    mixed = [dict(reversed(list(item.items()))) for item in mixed]
    for folder, items in (("a", found), ("b", mixed)):
        output.write_tables(results_of(items, plan), tmp_path / folder)
    one, two = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert {
        "cells.csv",
        "cells.parquet",
        "leaderboard.md",
        "tables.tex",
        "micro-lm-codes.md",
    } <= set(one)
    assert {
        f"micro-lm-codes/{n}.{k}" for n in ("tradeoff", "scores") for k in ("csv", "tex")
    } <= set(one)
    assert one == two


def test_tables_that_are_gone_are_removed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    output.write_tables(results_of([record(), record(target="other")]), tmp_path)
    assert (tmp_path / "micro-lm-other.md").exists()
    assert (tmp_path / "micro-lm-other" / "scores.tex").exists()
    output.write_tables(results_of([record()]), tmp_path)
    assert not list(tmp_path.glob("*other*"))
    assert (tmp_path / "micro-lm-codes" / "scores.tex").exists()
    assert (tmp_path / "mine.txt").exists()


def test_names_that_would_meet_in_one_file(tmp_path: Path) -> None:
    found = [record(base="a-b", target="c"), record(base="a", target="b-c")]
    written = output.write_tables(results_of(found), tmp_path)
    assert len([path for path in written if path.name == "tradeoff.tex"]) == 2
    assert len([path for path in written if path.suffix == ".md"]) == 3
    assert len(set(written)) == len(written)


@pytest.mark.parametrize("with_plan", [True, False])
def test_nothing_yet(tmp_path: Path, with_plan: bool) -> None:
    results = results_of([], plan_of([record()]) if with_plan else None)
    output.write_tables(results, tmp_path)
    shown = leaderboard.screen(results, output.places_of(results))
    assert f"{int(with_plan)} cells: 0 done" in shown


def test_screen_fits_a_terminal() -> None:
    results = fake_results(12, (2, 64), 3, 30, names=("A method with a very long title", *HOSTILE))
    lines = leaderboard.screen(results, output.places_of(results), Path("x")).splitlines()
    assert max(map(len, lines)) <= 110


def test_the_leaderboard_is_ranked_by_o() -> None:
    found = seeds("low", [10, 11], [-30, -31]) + seeds("high", [50, 51], [-3, -4])
    results = results_of([*found, failed(record("broken"))])
    shown = leaderboard.screen(results, output.places_of(results))
    order = [shown.index(f" {name}") for name in ("Zero-shot", "high", "low", "broken")]
    assert order == sorted(order)


def test_numbers_as_text() -> None:
    assert printed.number(-0.001, 2) == "0.00"
    assert printed.number(0.0, 1, signed=True) == "0.0"
    assert printed.number(12345.678, 1) == "12,345.7"
    assert printed.number(math.nan, 2) == printed.number(None, 2) == printed.DASH
    assert [printed.compact(v) for v in (950, 12345, 999_600, 7.62e9)] == [
        "950",
        "12.3k",
        "1M",
        "7.62G",
    ]
    assert [printed.p_value(v) for v in (0.0004, 0.0321, 1.0, None)] == [
        "< .001",
        ".032",
        "1.000",
        "–",
    ]
    row = {"O.rank_low": 2, "O.rank_high": 4}
    assert (printed.ranks(row), printed.ranks({"O.rank_low": 1, "O.rank_high": 1})) == ("2–4", "1")
    assert printed.ranks({}) == ""
