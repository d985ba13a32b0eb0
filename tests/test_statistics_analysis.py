"""`analyse` and `compare` on whole suites of made-up results."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from ballast.results import Results
from ballast.statistics import seeds
from ballast.statistics.analysis import COMPARED, Analysis, analyse
from ballast.statistics.compare import COLUMNS, ChoiceError, compare
from ballast.statistics.rows import control_of, row_keys, rows_of
from ballast.tables import tidy
from fake_records import failed, record
from fake_results import fake_results

PLACE = ("micro-lm", "codes")


@pytest.fixture(scope="module")
def results() -> Results:
    return fake_results(methods=5, seeds=3, items=40)


@pytest.fixture(scope="module")
def analysis(results) -> Analysis:
    return analyse(results, *PLACE)


def altered(results: Results, keep: np.ndarray | None = None, **columns) -> Results:
    """The results with some cells only, or with other columns in their table."""
    table = results.table.assign(**columns)
    return dataclasses.replace(results, table=table if keep is None else table[keep])


def made(*records) -> Results:
    items = fake_results(methods=1, seeds=1).items.iloc[:0]
    return Results("tiny", tidy(records, None), {r["id"]: r for r in records}, items)


def assert_same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a, b, check_exact=False, rtol=1e-9, atol=1e-9)


def test_contract(analysis, results):
    rows = analysis.rows
    assert rows.index.tolist() == list(dict.fromkeys(row_keys(results.table)))
    assert rows.loc["lora-r8", "seeds"] == (0, 1, 2)
    assert (rows["n_ok"] == 3).all()
    assert (rows["n_planned"] == 3).all()
    for name in ("E", "score.codes", "dce.codes", "seconds.train", "drift.kl", "churn.codes.n"):
        assert {name, f"{name}.sd", f"{name}.low", f"{name}.high"} <= set(rows)
    for name in COMPARED:
        for key in ("diff", "diff_low", "diff_high", "p", "p_adjusted", "p_base", "rank_high"):
            assert f"{name}.{key}" in rows
        assert rows[f"{name}.rank_low"].dtype == "Int64"
    assert rows["front"].between(0, 1).all()
    assert rows["rank"].dtype == "Int64"
    assert len(analysis.pairs) == 3 * 10 * 9 // 2
    assert list(analysis.pairs) == [
        "a", "b", "quantity", "difference", "low", "high", "p", "p_adjusted", "n_seeds"
    ]  # fmt: skip
    assert rows.columns.is_unique
    json.dumps(analysis.facts)


def test_means_and_intervals_are_those_of_the_tidy_table(analysis, results):
    table, keys = results.table, np.array(row_keys(results.table))
    for key in analysis.rows.index:
        for name in ("E", "F", "O", "score.sums", "drift.kl"):
            values = table.loc[keys == key, name].to_numpy(float)
            found = analysis.rows.loc[key]
            assert found[name] == pytest.approx(values.mean())
            assert found[f"{name}.sd"] == pytest.approx(values.std(ddof=1))
            low, _ = stats.t.interval(0.95, 2, values.mean(), max(stats.sem(values), 1e-12))
            assert found[f"{name}.low"] == pytest.approx(low, abs=1e-6)


def test_differences_to_the_control_are_those_of_the_pairs(analysis):
    assert analysis.control in ("lora-r2", "lora-r8")
    pairs = analysis.pairs[analysis.pairs["quantity"] == "O"]
    for _, pair in pairs[pairs["b"] == analysis.control].iterrows():
        row = analysis.rows.loc[pair["a"]]
        assert row["O.diff"] == pair["difference"]
        assert (row["O.diff_low"], row["O.diff_high"]) == (pair["low"], pair["high"])
        assert row["O.p"] == pair["p"] <= row["O.p_adjusted"]
        expected = row["O"] - analysis.rows.loc[analysis.control, "O"]
        assert pair["difference"] == pytest.approx(expected)
    assert analysis.rows.loc[analysis.control, ["O.diff", "O.p", "O.p_adjusted"]].isna().all()


def test_corrections_are_holm_for_the_control_and_the_base_and_hochberg_for_pairs(analysis):
    for name in COMPARED:
        for key in ("p", "p_base"):
            columns = analysis.rows[[f"{name}.{key}", f"{name}.{key}_adjusted"]].dropna()
            theirs = multipletests(columns.iloc[:, 0], method="holm")[1]
            np.testing.assert_allclose(columns.iloc[:, 1], theirs, rtol=1e-9)
        pairs = analysis.pairs[analysis.pairs["quantity"] == name]
        theirs = multipletests(pairs["p"], method="fdr_bh")[1]
        np.testing.assert_allclose(pairs["p_adjusted"], theirs, rtol=1e-9)


def test_rank_spans_are_those_of_the_pairs(analysis):
    for name in COMPARED:
        pairs = analysis.pairs[analysis.pairs["quantity"] == name]
        sure = pairs[pairs["p_adjusted"] < 0.05]
        for key, row in analysis.rows.iterrows():
            worse_than = ((sure["a"] == key) & (sure["difference"] < 0)).sum()
            worse_than += ((sure["b"] == key) & (sure["difference"] > 0)).sum()
            better_than = ((sure["a"] == key) & (sure["difference"] > 0)).sum()
            better_than += ((sure["b"] == key) & (sure["difference"] < 0)).sum()
            assert row[f"{name}.rank_low"] == 1 + worse_than
            assert row[f"{name}.rank_high"] == 10 - better_than


def test_items_of_the_base_are_in_the_test_against_it():
    # Too few rows for variances to be lent, too few items for the seeds to be all of the noise.
    results = fake_results(methods=2, items=6)
    analysis = analyse(results, *PLACE)
    unknown = dataclasses.replace(results, items=results.items.assign(base_score=np.nan))
    without = analyse(unknown, *PLACE)
    assert not without.facts["E.based"]
    assert any("against the base by seed alone" in note for note in without.notes)
    table, keys = results.table, np.array(row_keys(results.table))
    for key in without.rows.index:
        p = seeds.paired(table.loc[keys == key, "E"], np.zeros(3)).p
        assert without.rows.loc[key, "E.p_base"] == pytest.approx(p)
    assert (analysis.rows["E.p_base"] >= without.rows["E.p_base"] - 1e-12).all()
    assert (analysis.rows["E.p_base"] > without.rows["E.p_base"] + 1e-12).any()


def test_order_of_cells_seeds_and_items_does_not_matter(analysis, results):
    draw = np.random.default_rng(3)
    shuffled = dataclasses.replace(
        results,
        table=results.table.iloc[draw.permutation(len(results.table))],
        items=results.items.iloc[draw.permutation(len(results.items))],
    )
    other = analyse(shuffled, *PLACE)
    assert_same(other.rows.loc[analysis.rows.index], analysis.rows)
    assert other.facts == pytest.approx(analysis.facts)

    def by_name(found: Analysis) -> pd.DataFrame:
        pairs = found.pairs.astype({"a": str, "b": str, "quantity": str})
        swap = pairs["a"] > pairs["b"]
        size = pairs["difference"].where(~swap, -pairs["difference"])
        pairs = pairs.assign(x=pairs[["a", "b"]].min(axis=1), y=pairs[["a", "b"]].max(axis=1))
        pairs = pairs.assign(difference=size).set_index(["quantity", "x", "y"]).sort_index()
        return pairs[["difference", "p", "p_adjusted", "n_seeds"]]

    assert_same(by_name(other), by_name(analysis))


def test_same_input_same_output(analysis, results):
    again = analyse(results, *PLACE)
    pd.testing.assert_frame_equal(again.rows, analysis.rows, check_exact=True)
    pd.testing.assert_frame_equal(again.pairs, analysis.pairs, check_exact=True)
    assert (again.facts, again.notes) == (analysis.facts, analysis.notes)


def test_unequal_seeds_compare_what_both_have(results):
    keys, seed = np.array(row_keys(results.table)), results.table["seed"].to_numpy(int)
    part = altered(results, ~((keys == "m1-r2") & (seed == 0)) & ~((keys == "m2-r2") & (seed > 0)))
    found = analyse(part, *PLACE)
    pairs = found.pairs.set_index(["a", "b", "quantity"])
    assert pairs.loc[("m1-r2", "m1-r8", "E"), "n_seeds"] == 2
    table = results.table.assign(key=keys).set_index(["key", "seed"])["E"]
    expected = np.mean([table["m1-r2", s] - table["m1-r8", s] for s in (1, 2)])
    assert pairs.loc[("m1-r2", "m1-r8", "E"), "difference"] == pytest.approx(expected)
    row = found.rows.loc["m2-r2"]
    assert row["seeds"] == (0,)
    assert row[["E.sd", "E.low", "E.p", "E.p_base", "E.rank_low", "front"]].isna().all()
    assert row["E"] == pytest.approx(table["m2-r2", 0])
    assert pairs.loc[("m2-r2", "m2-r8", "E"), ["low", "high", "p", "p_adjusted"]].isna().all()
    assert found.rows["E.rank_high"].max() == 9
    assert any("1 row has one seed" in note for note in found.notes)
    assert any("1 to 3 seeds" in note for note in found.notes)


def test_a_suite_of_one_seed_concludes_nothing():
    found = analyse(fake_results(methods=4, seeds=1), *PLACE)
    none = [f"{q}.{k}" for q in COMPARED for k in ("sd", "low", "p", "p_base", "rank_low")]
    assert found.rows[[*none, "front"]].isna().all(axis=None)
    assert found.pairs[["p", "p_adjusted", "low", "high"]].isna().all(axis=None)
    assert found.facts["hypervolume"] is None
    assert found.facts["O.noise_floor"] is None
    assert found.facts["O.minimum_detectable"] is None
    assert found.rows["E"].notna().all()
    assert "one seed" in found.notes[0]


def test_rows_without_items_fall_back_to_seeds():
    results = fake_results(methods=2)
    analysis = analyse(results, *PLACE)
    bare = dataclasses.replace(results, items=results.items.iloc[:0])
    found = analyse(bare, *PLACE)
    assert found.facts["E.itemed"] == 0
    table, keys = results.table, np.array(row_keys(results.table))
    a, b = (table.loc[keys == key, "O"].to_numpy(float) for key in ("m1-r2", "m1-r8"))
    pairs = found.pairs.set_index(["a", "b", "quantity"])
    theirs = stats.ttest_rel(a, b).pvalue
    assert pairs.loc[("m1-r2", "m1-r8", "O"), "p"] == pytest.approx(theirs, rel=1e-6)
    assert any("noise of the test items is not in it" in note for note in found.notes)
    assert (analysis.pairs["p"] >= found.pairs["p"] - 1e-12).all()


def test_items_that_do_not_make_up_the_score_are_not_used(results):
    """A corpus metric, or a stale sample file."""
    cell = results.table["id"].iloc[0]
    changed = results.items["score"].where(results.items["cell"] != cell, 0.25)
    found = analyse(dataclasses.replace(results, items=results.items.assign(score=changed)), *PLACE)
    assert found.facts["E.itemed"] == len(found.rows) - 1
    assert any("1 of 10 rows lack items" in note for note in found.notes)


def test_only_cells_that_are_ok_enter_and_unplanned_ones_leave(results):
    keys, seed = np.array(row_keys(results.table)), results.table["seed"].to_numpy(int)
    status = np.array(results.table["status"], dtype=object)
    status[(keys == "m1-r8") & (seed == 2)] = "stale"
    status[keys == "m2-r8"] = "failed"
    status[keys == "m3-r8"] = "unplanned"
    found = analyse(altered(results, status=status, reason="diverged: NaN"), *PLACE)
    assert "m3-r8" not in found.rows.index
    assert found.rows.loc["m1-r8", ["n_ok", "n_planned", "note"]].tolist() == [2, 3, "1 stale"]
    lost = found.rows.loc["m2-r8"]
    assert (lost["n_ok"], lost["note"]) == (0, "3 failed (diverged: NaN)")
    assert lost["seeds"] == ()
    assert np.isnan(lost["E"])
    assert lost[["E.rank_low", "front", "O.p"]].isna().all()
    assert found.rows["O.rank_high"].max() == 8


def test_a_table_without_any_result():
    results = made(failed(record()), failed(record(seed=1)))
    found = analyse(results, *PLACE)
    assert found.rows["n_ok"].tolist() == [0]
    assert found.control is None
    assert found.pairs.empty
    assert found.notes[0] == "No cell is ok: nothing is compared."


def test_results_of_another_machine_are_a_row_of_their_own():
    here, there = record(e=50.0), record(e=10.0) | {"origin": "lab"}
    there["id"] = "lab:micro-lm.codes.lora-r8.s0-00000000"
    found = analyse(made(here, there, record(seed=1)), *PLACE)
    assert found.rows.loc["lora-r8", ["n_ok", "E", "title"]].tolist() == [2, 50.0, "lora"]
    assert found.rows.loc["lora-r8@lab", ["n_ok", "E", "title"]].tolist() == [1, 10.0, "lora @lab"]
    assert found.control == "lora-r8"


def test_a_seed_that_is_there_twice_counts_once():
    twice = record(e=10.0)
    twice["id"] = "micro-lm.codes.lora-r8.s0-zzzzzzzz"
    found = analyse(made(record(e=50.0), twice, record(seed=1)), *PLACE)
    assert found.rows.loc["lora-r8", ["n_ok", "E"]].tolist() == [2, 50.0]
    assert found.facts["doubles"] == 1
    assert any("1 further results" in note for note in found.notes)


def test_control_is_a_key_or_the_middle_rank_of_a_method():
    records = [record(rank=r, seed=s) for r in (2, 8, 32) for s in (0, 1)]
    records += [record(rank=16, seed=s, variant="wide") for s in (0, 1, 2)]
    rows = rows_of(made(*records).table, *PLACE)
    assert control_of(rows, "lora") == "lora-r8"
    assert control_of(rows, "lora-r16+wide") == "lora-r16+wide"
    assert control_of(rows, "dora") is None
    assert analyse(made(*records), *PLACE, control="lora-r2").control == "lora-r2"


def test_hypervolume_and_front_of_certain_results():
    """Without noise the draws are all the same."""
    points = {"a": (60.0, -20.0), "b": (30.0, -10.0), "c": (20.0, -30.0)}
    found = analyse(
        made(*(record(m, s, e=e, f=f) for m, (e, f) in points.items() for s in (0, 1))), *PLACE
    )
    assert found.rows["front"].tolist() == [1.0, 1.0, 0.0]
    share = (60 * (85 - 20) + 30 * 10) / (90 * 100)  # base: Target 10, Source 85
    for name in ("hypervolume", "hypervolume_low", "hypervolume_high"):
        assert found.facts[name] == pytest.approx(share)


def test_hostile_names_are_only_names():
    names = ("<script>alert(1)</script>", "a,b\"c'\n", "=1+1", r"\input{x}", "lora")
    found = analyse(fake_results(methods=5, names=names), *PLACE)
    assert set(found.rows["title"]) == set(names)


def test_compare_rows_is_the_analysis_of_the_pair(analysis, results):
    (found,) = compare(results, "m1-r2", "lora-r8")
    assert list(found.table) == list(COLUMNS)
    assert found.table["quantity"].tolist() == ["codes", "facts", "sums", "E", "F", "O"]
    pairs = analysis.pairs.set_index(["a", "b", "quantity"])
    table = found.table.set_index("quantity")
    for name in COMPARED:
        pair = pairs.loc[("lora-r8", "m1-r2", name)]
        assert table.loc[name, "difference"] == pytest.approx(-pair["difference"])
        assert table.loc[name, "low"] == pytest.approx(-pair["high"])
        assert table.loc[name, "p"] == pytest.approx(pair["p"])
    cube = results.items.set_index(["task", "cell", "item"])["score"]
    keys, ids = np.array(row_keys(results.table)), results.table["id"].to_numpy(object)
    a, b = (
        cube["codes"].unstack().loc[list(ids[keys == key])].to_numpy().mean(axis=0)
        for key in ("m1-r2", "lora-r8")
    )
    line = table.loc["codes"]
    assert (line["won"], line["lost"]) == ((a > b + 1e-9).sum(), (b > a + 1e-9).sum())
    assert line["n_items"] == 40
    assert line["difference"] == pytest.approx(100 * (a.mean() - b.mean()))


def test_compare_cells_uses_mcnemar(results):
    keys, seed = np.array(row_keys(results.table)), results.table["seed"].to_numpy(int)
    ids = [results.table["id"][(keys == k) & (seed == 1)].iloc[0] for k in ("m1-r2", "lora-r8")]
    (found,) = compare(results, *ids)
    assert found.kind == "cells"
    table = found.table.set_index("quantity")
    assert set(table["test"][:3]) == {"exact McNemar"}
    for name, line in table.iterrows():
        assert line["low"] <= line["difference"] <= line["high"]
        assert (
            line["won"] + line["lost"]
            <= line["n_items"]
            == (40, 80, 120)[{"F": 1, "O": 2}.get(name, 0)]
        )
    swapped = compare(results, *ids[::-1])[0].table
    np.testing.assert_allclose(swapped["p"], found.table["p"], rtol=1e-9)
    assert swapped["won"].tolist() == found.table["lost"].tolist()


def test_compare_names_what_is_wrong(results):
    cell = results.table["id"].iloc[0]
    with pytest.raises(ChoiceError, match="did you mean 'lora-r8'"):
        compare(results, "lora-r9", "m1-r2")
    with pytest.raises(ChoiceError, match="one is a cell"):
        compare(results, cell, "m1-r2")
    with pytest.raises(ChoiceError, match="together nowhere"):
        compare(results, "lora-r8", "m1-r2", base="other")


def test_compare_finds_every_place():
    found = compare(fake_results(methods=2, targets=("codes", "more")), "lora-r8", "m1-r8")
    assert [c.target for c in found] == ["codes", "more"]
