"""The command line: what each command finds, how it says it, and what it refuses in one line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from typer.testing import CliRunner

from ballast import cli
from ballast.commands import compare as comparing
from ballast.commands import recommend as advising
from ballast.commands.app import app
from ballast.commands.compare import compare_all
from ballast.commands.recommend import LIMITS, advise, differences_to, with_costs
from ballast.commands.screen import Screen, finite
from ballast.commands.show import describe
from ballast.commands.source import find, open_results
from ballast.errors import DataError
from ballast.layout import Layout
from ballast.results import ITEM_COLUMNS, Results, kept_results
from ballast.statistics.analysis import analyse
from ballast.statistics.rows import row_keys
from ballast.tables import tidy
from fake_records import failed, plan_of, record
from fake_results import fake_results
from kept_fakes import HOSTILE, keep_fake

KEPT = Path(__file__).resolve().parents[1] / "results/kept/all-methods"
PLACE = ("micro-lm", "codes")


@pytest.fixture(scope="module")
def results() -> Results:
    return fake_results(methods=4, ranks=(2, 8), seeds=3, items=40, targets=("codes", "sums2"))


@pytest.fixture(scope="module")
def folder(results, tmp_path_factory) -> Path:
    return keep_fake(results, tmp_path_factory.mktemp("kept") / "tiny")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    found = fake_results(methods=len(HOSTILE) + 1, ranks=(8,), seeds=2, items=20, names=HOSTILE)
    return keep_fake(found, tmp_path_factory.mktemp("hostile") / "tiny")


@pytest.fixture(scope="module")
def real() -> Results:
    return kept_results(KEPT)


@pytest.fixture
def run(capsys):
    """run(words...) -> what was printed; fails on another exit code, or on an error."""

    def call(*words: Any, code: int = 0) -> str:
        assert cli.main([str(word) for word in words]) == code
        out, err = capsys.readouterr()
        assert bool(err) == bool(code)
        if code:
            assert err.startswith("ballast: ")
            assert err.count("\n") == 1
        return err if code else out

    return call


def strict(text: str) -> Any:
    """JSON without NaN or infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


# The command as a whole.


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys, time; start = time.process_time()\n"
        "from ballast.cli import main; main(['--help'])\n"
        "heavy = {'torch', 'pandas', 'numpy', 'transformers', 'pyarrow', 'jsonschema'}\n"
        "print(time.process_time() - start, sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = done.stderr.split(maxsplit=1)
    assert modules.strip() == "[]"
    assert float(seconds) < 0.5
    for name in ("retry", "cell", "plan", "export", "methods", "benchmark", "compare", "show",
                 "recommend", "pack", "peft"):  # fmt: skip
        assert f"  {name}" in done.stdout


def test_version_and_bare_command(run):
    assert run("--version").startswith("ballast 0.")
    assert "Commands:" in run()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nope"], "No such command 'nope'"),
        (["retry", "--nope"], "No such option: --nope"),
        (["compare", "a"], "Missing argument"),
        (["peft"], "Missing command"),
        (["recommend", "--memory", "much"], "--memory"),
        (["recommend", "--memory", "-1"], "--memory"),
        (["recommend", "--forgetting", "nan"], "--forgetting"),
        (["benchmark", "x", "--hidden", "512", "wide"], "--hidden"),
        (["plan", "missing.yaml"], "missing.yaml"),
        (["show", "x", "--suite", "a.yaml", "--results", "b"], "give one of them"),
        (["show", "x", "--results", "nowhere"], "nowhere: no results there"),
        (["pack", "a", "b", "c.zip", "--origin", "me"], "[SUITE] FILE"),
        (["pack", "a.tar", "--origin", "me"], "ends in .zip"),
        (["pack", "a.zip"], "--origin"),
    ],
)
def test_errors_of_the_users_are_one_line(run, words, said):
    assert said in run(*words, code=2)


def test_options_of_several_values_take_all_that_follow():
    runner = CliRunner()
    seen = {}

    def catch(given: dict[str, Any]) -> Any:
        seen.update(given)
        raise DataError("enough")

    from ballast import benchmark

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark.Settings, "of", catch)
        words = ["--hidden", "512", "2048", "--rank", "4", "--methods", "lora", "dora"]
        done = runner.invoke(app, ["benchmark", "out", *words, "--precision", "fp32"])
    assert str(done.exception) == "enough"
    assert seen == {
        "hidden": [512, 2048], "rank": 4, "methods": ["lora", "dora"], "precision": ["fp32"]
    }  # fmt: skip


def test_arguments_for_snakemake_need_no_suite(monkeypatch, run):
    from ballast.commands import work

    seen = []
    monkeypatch.setattr(work, "plan_file", lambda path, layout: seen.append(path) or ("x", path))
    monkeypatch.setattr(work, "read_table", lambda path: pd.DataFrame({"id": ["a"]}))
    monkeypatch.setattr("ballast.status.forget_failed", lambda *_: ["a"])
    calls = []
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(work.subprocess, "run", lambda command: calls.append(command) or done)
    run("retry", "--", "--cores", "2")
    run("retry", "own.yaml", "--", "-n")
    assert [str(path) for path in seen] == ["config/config.yaml", "own.yaml"]
    assert calls[0][3:] == ["--configfile", "config/config.yaml", "--cores", "2"]
    assert calls[1][3:] == ["--configfile", "own.yaml", "-n"]


# Names of rows and cells.


def test_names(results):
    one = next(iter(results.records))
    (cell,) = find(results, one)
    assert (cell.cell, cell.place) == (one, (cell.base, cell.target))
    assert [n.place for n in find(results, "lora-r8")] == [PLACE, ("micro-lm", "sums2")]
    assert find(results, one[:-4])[0].cell == one
    row = find(results, "micro-lm.codes.lora-r8")
    assert [(n.cell, n.key, n.place) for n in row] == [(None, "lora-r8", PLACE)]
    with pytest.raises(DataError, match="6 cells of 2 rows begin so"):
        find(results, "micro-lm.codes.lora")
    with pytest.raises(DataError, match="did you mean 'lora-r8'"):
        find(results, "loar-r8")
    with pytest.raises(DataError, match="unknown row or cell ''"):
        find(results, "")


def test_results_of_a_suite_of_a_folder_and_kept(results, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text("suite: tiny\n")
    layout = Layout(Layout.here().root, Path("results"))
    monkeypatch.setattr("ballast.commands.source._plan", lambda *_: None)
    with pytest.raises(DataError, match="no records; run the suite first"):
        open_results(config, None, layout)
    (tmp_path / "results/kept").mkdir(parents=True)
    (tmp_path / "results/kept/tiny").symlink_to(folder)
    assert set(open_results(config, None, layout).records) == set(results.records)
    one = next(iter(results.records.values()))
    path = tmp_path / "results/tiny/cells" / one["id"] / "run.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(DataError, match="1 damaged"):
        open_results(config, None, layout)
    path.write_text(json.dumps(one))
    assert set(open_results(config, None, layout).records) == {one["id"]}
    assert set(open_results(None, Path("results/tiny"), layout).records) == {one["id"]}
    assert len(open_results(None, folder, layout).records) == len(results.records)


# compare.


def test_compare_in_words_and_json(folder, run):
    words = ("compare", "lora-r8", "m1-r8", "--results", folder, "--target", "codes")
    text = run(*words)
    assert "A: lora r8 (lora-r8, 3 seeds: 0, 1, 2)" in text
    found = strict(run(*words, "--json"))
    assert list(found) == ["format", "command", "suite", "level", "comparisons"]
    (one,) = found["comparisons"]
    assert list(one) == ["base", "target", "kind", "a", "b", "quantities", "verdict"]
    assert [line["quantity"] for line in one["quantities"]] == [
        "codes", "facts", "sums", "E", "F", "O"
    ]  # fmt: skip
    keys = {"quantity", "title", "role", "unit", *comparing.NUMBERS, "test", "told_apart"}
    assert all(set(line) == keys for line in one["quantities"])
    assert one["verdict"] in text.replace("\n", " ")


def test_means_are_those_of_the_table(results):
    (one,) = compare_all(results, "lora-r8", "m1-r2", target="codes")["comparisons"]
    table = results.table[results.table["target"] == "codes"]
    means = table.groupby(row_keys(table))[["E", "F", "O"]].mean()
    for line in one["quantities"][-3:]:
        a, b = (means.loc[key, line["quantity"]] for key in ("lora-r8", "m1-r2"))
        assert (line["value_a"], line["value_b"]) == (pytest.approx(a), pytest.approx(b))
        assert line["difference"] == pytest.approx(a - b)
        assert line["low"] <= line["difference"] <= line["high"]
        assert line["told_apart"] == (line["p"] < 0.05)


def test_every_place_of_two_rows_is_compared(results):
    found = compare_all(results, "lora-r8", "m1-r2")["comparisons"]
    assert [(one["base"], one["target"]) for one in found] == [PLACE, ("micro-lm", "sums2")]


def test_two_cells_are_compared_by_mcnemar(results):
    cells = [cell for cell in results.records if ".codes." in cell and "s0" in cell]
    a, b = cells[0], cells[2]
    (one,) = compare_all(results, a, b[:-3])["comparisons"]
    assert (one["kind"], one["a"]["cell"], one["b"]["cell"]) == ("cells", a, b)
    line = one["quantities"][0]
    items = results.items[results.items["task"] == "codes"]
    x, y = (items[items["cell"] == cell]["score"].to_numpy() for cell in (a, b))
    won, lost = int((x > y).sum()), int((x < y).sum())
    assert (line["won"], line["lost"], line["test"]) == (won, lost, "exact McNemar")
    assert line["p"] == pytest.approx(binomtest(won, won + lost).pvalue)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ("lora-r8", "lora-r8", "compared with itself"),
        ("micro-lm.codes.lora-r8.s0", "micro-lm.codes.lora-r8.s0", "compared with itself"),
        ("micro-lm.codes.lora-r8.s0", "micro-lm.sums2.lora-r8.s0", "targets codes and sums2"),
        ("micro-lm.codes.lora-r8", "micro-lm.sums2.lora-r8", "targets codes and sums2"),
        ("lora-r8", "loar-r8", "unknown row or cell 'loar-r8'"),
    ],
)
def test_what_cannot_be_compared(folder, run, a, b, said):
    assert said in run("compare", a, b, "--results", folder, code=2)


def test_a_row_without_result_says_why(results):
    bad = [failed(record("broken", seed, target="codes")) for seed in range(2)]
    other = record("dora", base="other")
    table = tidy([*results.records.values(), *bad, other], None)
    records = results.records | {r["id"]: r for r in [*bad, other]}
    more = replace(results, table=table, records=records)
    with pytest.raises(DataError, match=r"broken-r8: no result to compare .*loss is NaN"):
        compare_all(more, "lora-r8", "broken-r8")
    with pytest.raises(DataError, match="on no base and target in common"):
        compare_all(more, "lora-r8", "dora-r8")
    with pytest.raises(DataError, match="unknown base 'x'"):
        compare_all(more, "lora-r8", "m1-r8", base="x")


def lines(**values: tuple[float, float, float, float | None]) -> list[dict[str, Any]]:
    return [
        {"quantity": name, "role": "measure", "difference": d, "low": low, "high": high,
         "told_apart": None if p is None else p < 0.05}
        for name, (d, low, high, p) in values.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"E": (1, -5, 7, 0.6), "F": (12.3, 4.1, 20.5, 0.01), "O": (13.3, 2, 24, 0.03)},
            "A forgets 12.3 points less (95 % 4.1 to 20.5) and is ahead by 13.3 points in O "
            "(95 % 2.0 to 24.0) than B; E cannot be told apart.",
        ),
        (
            {"E": (-4, -6, -2, 0.001), "F": (-8, -9, -7, 0.001), "O": (-12, -14, -10, 0.001)},
            "A forgets 8.0 points more (95 % 7.0 to 9.0), learns 4.0 points less (95 % 2.0 to 6.0) "
            "and is behind by 12.0 points in O (95 % 10.0 to 14.0) than B.",
        ),
        (
            {"E": (1, -5, 7, 0.6), "F": (1, -5, 7, 0.6), "O": (2, -5, 9, 0.6)},
            "E, F and O cannot be told apart.",
        ),
        (
            {"E": (1, math.nan, math.nan, None), "F": (1, math.nan, math.nan, None)},
            "of E and F nothing can be said (one seed in common).",
        ),
        ({"E": (math.nan, math.nan, math.nan, None)}, "They have no measure in common."),
    ],
)
def test_the_verdict_in_words(values, said):
    found = {"a": {"name": "A"}, "b": {"name": "B"}, "kind": "rows", "quantities": lines(**values)}
    assert comparing._verdict(found) == said


# show.


def test_show_a_cell(results, folder, run):
    one = next(iter(results.records.values()))
    text = run("show", one["id"], "--results", folder)
    row = results.table.set_index("id").loc[one["id"]]
    assert f"E {row['E']:+.1f}, F {row['F']:+.1f}, O {row['O']:+.1f} points" in text
    for heading in ("Scores", "Items against the base", "Drift", "Costs", "Settings"):
        assert heading in text
    (shown,) = strict(run("show", one["id"], "--results", folder, "--json"))["shown"]
    assert (shown["kind"], shown["id"], shown["status"]) == ("cell", one["id"], "ok")
    assert shown["measures"]["E"] == pytest.approx(row["E"])
    tasks = {task["task"]: task for task in shown["tasks"]}
    assert set(tasks) == set(one["tasks"])
    assert tasks["codes"]["change"] == pytest.approx(
        one["scores"]["codes"]["value"] - one["base_scores"]["codes"]["value"]
    )
    assert tasks["codes"]["churn"] == one["churn"]["codes"]
    assert shown["drift"] == one["drift"]
    assert shown["settings"] == one["settings"]


def test_show_a_row(results, folder, run):
    found = strict(run("show", "m1-r8", "--results", folder, "--json"))["shown"]
    assert [one["target"] for one in found] == ["codes", "sums2"]
    row = analyse(results, *PLACE).rows.loc["m1-r8"]
    assert found[0]["measures"]["F"]["mean"] == pytest.approx(row["F"])
    assert found[0]["measures"]["F"]["high"] == pytest.approx(row["F.high"])
    assert found[0]["control"] == "lora-r2"
    assert [cell["seed"] for cell in found[0]["cells"]] == [0, 1, 2]
    text = run("show", "m1-r8", "--results", folder, "--target", "codes")
    assert "3 seeds of 3 ok" in text
    assert "tuned on sums2" not in text
    assert "unknown target 'x'" in run(
        "show", "m1-r8", "--results", folder, "--target", "x", code=2
    )


def test_failed_and_missing_cells_show_their_reason(results, run, tmp_path):
    bad = failed(record("bad", 1), "oom", "out of memory [bold]")
    records = [record("bad", 0), bad]
    keep_fake(
        Results("tiny", pd.DataFrame(), {r["id"]: r for r in records}, results.items.iloc[:0]),
        tmp_path / "tiny",
    )
    text = run("show", bad["id"], "--results", tmp_path / "tiny")
    assert "Status: failed: oom: out of memory [bold]" in text
    assert "no scores, as the cell is not ok" in text
    (shown,) = strict(run("show", bad["id"], "--results", tmp_path / "tiny", "--json"))["shown"]
    assert set(shown["measures"].values()) == {None}
    assert {task["score"] for task in shown["tasks"]} == {None}
    text = run("show", "bad-r8", "--results", tmp_path / "tiny")
    assert "1 seed of 2 ok; 1 failed (oom: out of memory [bold])" in text
    assert "One seed: no interval, no test and no rank." in text
    planned = tidy([record("bad", 0)], plan_of([record("bad", 0), record("bad", 1)]))
    missing = planned.loc[planned["status"] == "missing", "id"].iloc[0]
    (shown,) = describe(Results("tiny", planned, {}, results.items.iloc[:0]), missing)["shown"]
    assert (shown["status"], shown["tasks"]) == ("missing", [])


def test_samples_gained_and_lost(results, run, tmp_path):
    one = next(iter(results.records.values()))
    home = tmp_path / "tiny/cells" / one["id"]
    home.mkdir(parents=True)
    (home / "run.json").write_text(json.dumps(one))
    entry = {"item": 3, "question": "What [red]is[/]\nthis?", "reference": "a", "before": "b",
             "after": "\x1b[31mc"}  # fmt: skip
    changes = {"codes": {"gained": [entry] * 5, "forgotten": []}}
    (home / "changes.json").write_text(json.dumps(changes))
    text = run("show", one["id"], "--results", tmp_path / "tiny", "--samples", "2")
    assert text.count("What [red]is[/] this?") == 2
    assert "\x1b" not in text
    words = ("show", one["id"], "--results", tmp_path / "tiny", "--json", "--samples")
    assert len(strict(run(*words, "4"))["shown"][0]["samples"]["codes"]["gained"]) == 4
    assert strict(run(*words, "0"))["shown"][0]["samples"] == {}
    kept = keep_fake(results, tmp_path / "kept")
    row = {"cell": one["id"], "task": "codes", "kind": "forgotten", "entry": json.dumps(entry)}
    pd.DataFrame([row]).to_parquet(kept / "changes.parquet")
    (shown,) = strict(run("show", one["id"], "--results", kept, "--json"))["shown"]
    assert shown["samples"] == {"codes": {"gained": [], "forgotten": [entry]}}


# recommend.


@pytest.fixture(scope="module")
def varied() -> Results:
    """Rows whose costs differ, some of which were not measured, and a row without a result."""
    made = fake_results(methods=7, ranks=(2, 8), seeds=3, items=60, seed=1)
    draw = np.random.default_rng(0)
    for key in sorted({cell.rsplit(".s", 1)[0] for cell in made.records}):
        mine = [r for cell, r in made.records.items() if cell.startswith(f"{key}.s")]
        seconds, memory = draw.integers(1, 10), draw.integers(100, 110)
        for found in mine:
            found["costs"]["seconds"]["train"] = float(seconds)
            found["costs"]["memory_mb"]["train"] = float(memory)
            found["costs"]["adapter_bytes"] = int(1e6 * draw.integers(1, 5))
    mine[0]["costs"]["memory_mb"]["train"] = mine[1]["costs"]["memory_mb"]["train"] = None
    mine[2]["costs"]["memory_mb"]["train"] = None
    bad = failed(record("broken"))
    records = [*made.records.values(), bad]
    return replace(made, table=tidy(records, None), records={r["id"]: r for r in records})


ANALYSED: dict[int, Any] = {}


def analysed(results: Results, base: str, target: str) -> Any:
    if id(results) not in ANALYSED:
        ANALYSED[id(results)] = analyse(results, base, target)
    return ANALYSED[id(results)]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    limits=st.fixed_dictionaries(
        {},
        optional={
            "memory_mb": st.integers(99, 111), "seconds": st.integers(0, 10),
            "forgetting": st.integers(0, 60), "parameters": st.sampled_from([1999, 2000, 8000]),
            "adapter_mb": st.floats(1, 5),
        },
    )
)  # fmt: skip
def test_recommend_is_the_brute_force(varied, limits):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(advising, "analyse", analysed)
        found = finite(advise(varied, *PLACE, limits))
    quantity = "E" if "forgetting" in limits else "O"
    kept, beyond = {}, dict.fromkeys(limits, 0)
    keys = sorted(set(row_keys(varied.table)) - {"broken-r8"})
    for key in keys:
        mine = [r for c, r in varied.records.items() if c.startswith(f"{'.'.join(PLACE)}.{key}.s")]
        rows = varied.table[varied.table["id"].isin([r["id"] for r in mine])]
        memory = [r["costs"]["memory_mb"]["train"] for r in mine]
        costs = {
            "memory_mb": math.nan if None in memory else sum(memory) / 3,
            "seconds": sum(r["costs"]["seconds"]["train"] for r in mine) / 3,
            "forgetting": -rows["F"].mean(),
            "parameters": mine[0]["costs"]["trainable_parameters"],
            "adapter_mb": sum(r["costs"]["adapter_bytes"] for r in mine) / 3e6,
        }
        broken = [name for name, limit in limits.items() if not costs[name] <= limit]
        for name in broken:
            beyond[name] += 1
        if not broken:
            kept[key] = rows[quantity].mean()
    assert found["rows_within_limits"] == len(kept)
    assert {name: n["rows"] for name, n in found["excluded_by"].items()} == beyond
    assert found["rows_without_result"] == 1
    if not kept:
        assert (found["best"], found["decided"]) == (None, False)
        assert found["verdict"] == "No row is within the limits."
        return
    best = max(kept, key=kept.get)
    assert found["best"][quantity] == pytest.approx(kept[best])
    best = found["best"]["key"]
    tied = set()
    for pair in analysed(varied, *PLACE).pairs.to_dict("records"):
        if pair["quantity"] == quantity and best in (pair["a"], pair["b"]):
            other = pair["b"] if pair["a"] == best else pair["a"]
            if other in kept and not pair["p_adjusted"] < 0.05:
                tied.add(other)
    assert {row["key"] for row in found["not_told_apart"]} == tied
    assert found["decided"] == (not tied and len(kept) > 1)
    assert found["best"]["name"] in found["verdict"]


def test_differences_have_the_sign_of_the_other_row(varied):
    analysis = analysed(varied, *PLACE)
    for key in ("m1-r8", "lora-r2"):
        found = differences_to(key, analysis, "E")
        expected = analysis.rows["E"] - analysis.rows["E"][key]
        for other, row in found.iterrows():
            if not math.isnan(row["difference"]):
                assert row["difference"] == pytest.approx(expected[other])
                assert row["low"] <= row["difference"] <= row["high"]


def test_a_post_hoc_row_costs_what_its_parents_cost():
    a, b = record("lora", 0), record("lora", 1)
    made = record("soup", 0, rank=None)
    made["identity"]["parents"] = [a["id"], b["id"]]
    a["costs"]["seconds"]["train"], b["costs"]["seconds"]["train"] = 10.0, 20.0
    a["costs"]["memory_mb"]["train"], b["costs"]["memory_mb"]["train"] = 900.0, 500.0
    made["costs"]["seconds"]["train"], made["costs"]["memory_mb"]["train"] = 0.0, None
    lost = record("ties", 0, rank=None)
    lost["identity"]["parents"] = ["gone"]
    found = [a, b, made, lost]
    items = pd.DataFrame(columns=list(ITEM_COLUMNS))
    results = Results("tiny", tidy(found, None), {r["id"]: r for r in found}, items)
    rows = analyse(results, *PLACE).rows
    costs = with_costs(rows.copy(), results.table, *PLACE)[["seconds", "memory_mb"]]
    assert costs.loc["soup"].tolist() == [30.0, 900.0]
    assert costs.loc["lora-r8"].tolist() == [15.0, 700.0]
    assert costs.loc["ties"].isna().all()


def test_recommend_in_words(folder, run, results):
    words = ("recommend", "--results", folder, "--target", "codes")
    text = run(*words, "--forgetting", "60", "--seconds", "100")
    assert "at most 100 seconds of training, at most 60 points of forgetting" in text
    assert "8 of 8 rows are within the limits." in text
    found = strict(run(*words, "--memory", "1", "--json"))
    assert list(found["limits"]) == list(LIMITS)
    assert found["excluded_by"] == {"memory_mb": {"rows": 8, "of_them_not_measured": 0}}
    assert "No row is within the limits." in run(*words, "--memory", "1")
    both = "give --base and --target; there are micro-lm tuned on codes, micro-lm tuned on sums2"
    assert both in run("recommend", "--results", folder, code=2)


@pytest.mark.parametrize(
    ("tied", "within", "said"),
    [
        (0, 1, "A is the only row within the limits: O +3.0 points."),
        (0, 3, "Take A: O +3.0 points, and the tests tell it apart from the other 2 rows"),
        (2, 3, "none of the 2 other rows within the limits can be told apart from it"),
        (1, 3, "but 1 row of the 2 others within the limits cannot be told apart from it"),
    ],
)
def test_a_choice_that_the_noise_allows_or_not(tied, within, said):
    row = {"name": "A", "O": 3.0, "p_adjusted": 0.5}
    found = {"best": row, "not_told_apart": [row] * tied, "ranked_by": "O",
             "rows_within_limits": within, "decided": not tied and within > 1}  # fmt: skip
    verdict = advising._verdict(found)
    assert said in verdict
    assert ("noise does not allow" in verdict) == bool(tied)
    found["not_told_apart"] = [row | {"p_adjusted": math.nan}] * tied
    assert advising._verdict(found).startswith("One seed allows no choice") == bool(tied)


# What it looks like.


@pytest.mark.parametrize("columns", [40, 110])
def test_hostile_names_stay_text_in_80_to_110_columns(hostile, run, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "")
    texts = [
        run("recommend", "--results", hostile),
        run("show", "m1-r8", "--results", hostile),
        run("show", "m9-r8", "--results", hostile),
        run("compare", "m1-r8", "m9-r8", "--results", hostile),
    ]
    for text in texts:
        assert "\x1b" not in text
        assert "\x00" not in text
        assert max(map(len, text.splitlines())) <= min(max(columns, 80), 110)
        assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert "[bold red]x[/bold red] r8" in texts[1]
    assert "{0} %s \\n r8" in texts[2]
    assert "A: [bold red]x[/bold red] r8" in texts[3]
    names = {record["method"]["title"] for record in kept_results(hostile).records.values()}
    assert set(HOSTILE) <= names
    for name in ("m1-r8", "m9-r8"):
        (shown,) = strict(run("show", name, "--results", hostile, "--json"))["shown"]
        assert shown["title"] in names


def test_no_colour_where_there_is_no_terminal_and_markup_is_text(capsys):
    screen = Screen()
    screen.line("[bold]:smile: x[/bold]", style="bold")
    screen.table(["[red]a[/red]"], [["[link=http://x]y[/link]"]])
    screen.facts([("[b]", "[i]text[/i]")])
    text = capsys.readouterr().out
    assert "[bold]:smile: x[/bold]" in text
    assert "[link=http://x]y[/link]" in text
    assert "[red]a[/red]" in text
    assert "  [b]  [i]text[/i]" in text
    assert "\x1b" not in text


def test_json_is_finite():
    value = {"a": math.nan, "b": [math.inf, np.float64(1.5), pd.NA, np.int64(3)], 1: (True, None)}
    assert finite(value) == {"a": None, "b": [None, 1.5, None, 3], "1": [True, None]}
    assert finite(pd.NaT) is None


def test_a_reader_that_goes_away_is_no_error(folder):
    command = f"{sys.executable} -m ballast.cli show lora-r8 --results {folder} --json | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ)
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_on_the_kept_suite(real):
    """Cells of all-methods: words and numbers agree on results that were measured."""
    (one,) = compare_all(real, "lora-r8", "l2_sp", target="lm_dialect")["comparisons"]
    assert one["verdict"].startswith("LoRA r8 forgets ")
    found = advise(real, "micro-lm", "lm_mix", {"forgetting": 1000.0})
    assert found["rows_within_limits"] == found["rows"] == 5
    with pytest.raises(DataError, match="targets"):
        compare_all(real, "micro-lm.lm_mix.lora-r8.s0", "micro-lm.lm_dialect.lora-r8.s0")
