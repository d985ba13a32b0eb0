"""The plan: which cells there are, what their keys depend on, and how long planning takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from ballast.errors import SuiteError
from ballast.layout import Layout
from ballast.plan import make_plan, plan_key
from ballast.rates import COLUMNS, KEYS, best_rates, read_rates
from ballast.suite import load_suite
from ballast.tune import make_tune_plan, rates_table
from checkout import BIN, SUITE, Checkout

CELLS = 2000
SECONDS = 60  # a plan of `CELLS` cells, and a dry run of them, on one busy core


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Checkout:
    made = Checkout(tmp_path_factory.mktemp("original"))
    made.save_base()
    return made


@pytest.fixture
def home(original, tmp_path) -> Checkout:
    """A checkout whose files a test may edit; data and base stay where they are."""
    made = object.__new__(Checkout)
    made.root = tmp_path / "home"
    ignore = shutil.ignore_patterns("base", "data", "results")
    shutil.copytree(original.root, made.root, ignore=ignore)
    return made


def config_of(home: Checkout, **changes) -> dict:
    config = yaml.safe_load((home.root / "config/config.yaml").read_text())
    return {k: v for k, v in (config | changes).items() if v is not None}


def load(home: Checkout, **changes):
    return load_suite(config_of(home, **changes), Layout(home.root, home.root / "results"))


def plan_of(home: Checkout, **changes) -> pd.DataFrame:
    return make_plan(load(home, **changes)).set_index("id", drop=False)


def labels(plan: pd.DataFrame) -> list[str]:
    return sorted(cell.rpartition("-")[0] for cell in plan["id"])


def differing(before: pd.DataFrame, after: pd.DataFrame, column: str) -> set[str]:
    """Methods of the cells of both plans whose key is another one."""
    both = before.join(after.add_suffix(".after"), how="inner")
    return set(both.loc[both[column] != both[f"{column}.after"], "method"])


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "\n# edited\n")


def test_one_row_per_method_rank_variant_and_seed(home):
    methods = {
        "full_st": {"variants": {"tuned": {"connector": "tuned"}}},
        "lora": {"ranks": [2, 4], "variants": {"dropped": {"set": {"dropout": 0.1}}}},
        "dora": {},
        "wise_ft": {"parents": ["full_st", "lora-r4+dropped", "full_st+tuned"]},
    }
    plan = plan_of(home, methods=methods, seeds=[0, 1])
    rows = [  # the base is a text model: no connector, no cells of that variant
        "dora-r2",
        "full_st",
        "lora-r2",
        "lora-r2+dropped",
        "lora-r4",
        "lora-r4+dropped",
        "wise_ft+of-full_st",
        "wise_ft+of-lora-r4+dropped",
    ]
    assert plan.attrs["left_out"] == ["full_st+tuned on tiny"]
    assert labels(plan) == sorted(f"tiny.tiny_learn.{r}.s{s}" for r in rows for s in (0, 1))


def test_every_base_and_target_has_its_own_rows(home):
    bases = config_of(home)["bases"]
    spec = bases["tiny"]
    bases = {"one": spec | {"targets": ["tiny_learn", "vlm_color"]}, "two": spec}
    plan = plan_of(home, bases=bases, methods=["lora"])
    assert plan[["base", "target"]].value_counts().to_dict() == {
        ("one", "tiny_learn"): 1,
        ("one", "vlm_color"): 1,
        ("two", "tiny_learn"): 1,
    }
    for _, row in plan.iterrows():
        assert set(json.loads(row["spec"])["tasks"]) == {"tiny_keep", row["target"]}


def test_ids_are_unique_readable_and_name_no_folder(home):
    plan = plan_of(home, methods="all", ranks=[2, 4], seeds=[0, 1, 2])
    assert plan["id"].is_unique
    for cell in plan["id"]:
        assert re.fullmatch(r"tiny\.tiny_learn\.[a-z0-9_]+[a-z0-9_+-]*\.s[012]-[0-9a-f]{8}", cell)
    assert plan.loc[plan["method"] == "lora", "id"].str.contains(r"lora-r[24]\.s").all()


def test_methods_without_a_rank_have_no_rank_axis(home):
    plan = plan_of(home, methods="all", ranks=[2, 4, 8])
    assert plan.loc[plan["method"] == "full_st", "rank"].tolist() == [pd.NA]
    assert plan.loc[plan["method"] == "lora", "rank"].tolist() == [2, 4, 8]


def test_posthoc_cells_name_the_parent_of_their_own_seed(home):
    plan = plan_of(home, seeds=[0, 1])
    children = plan[plan["posthoc"].astype(bool)]
    assert len(children) == 2
    for _, child in children.iterrows():
        parent = plan.loc[child["parents"]]
        assert (parent["method"], parent["seed"]) == ("full_st", child["seed"])
    assert set(plan.loc[~plan["posthoc"].astype(bool), "parents"]) == {""}


# What makes a cell stale, and what does not.


def test_an_edited_method_file_changes_its_cells_and_their_children(home):
    methods = ["full_st", "lora", "dora", "lora_plus", "wise_ft"]
    before = plan_of(home, methods=methods)
    edit(home.root / "methods/full_st.py")
    after = plan_of(home, methods=methods)
    assert list(before["id"]) == list(after["id"])
    assert differing(before, after, "train_key") == {"full_st", "wise_ft"}
    assert differing(before, after, "eval_key") == set()


def test_an_edited_method_file_changes_those_that_import_it(home):
    before = plan_of(home, methods="all")
    edit(home.root / "methods/lora.py")
    after = plan_of(home, methods="all")
    importing = {
        path.stem
        for path in (home.root / "methods").glob("*.py")
        if re.search(r"^from \.lora import|^from \. import (?:.*\s)?lora\b", path.read_text(), re.M)
    }
    changed = differing(before, after, "train_key")
    assert changed >= {"lora"} | importing
    assert "full_st" not in changed
    assert "wise_ft" not in changed


def test_a_new_method_file_adds_its_cells_and_touches_no_other(home):
    before = plan_of(home, methods="all")
    text = (home.root / "methods/dora.py").read_text().replace('"DoRA"', '"New"')
    (home.root / "methods/new.py").write_text(text)
    after = plan_of(home, methods="all")
    assert set(after.loc[~after["id"].isin(before["id"]), "method"]) == {"new"}
    assert set(before["id"]) <= set(after["id"])
    assert differing(before, after, "train_key") == set()


def test_an_edited_upstream_task_changes_scores_alone(home):
    before = plan_of(home)
    path = home.root / "workflow/tasks/tiny/tiny_keep.yaml"
    path.write_text(path.read_text().replace("version: 1", "version: 2"))
    after = plan_of(home)
    assert list(before["id"]) == list(after["id"])
    assert differing(before, after, "train_key") == set()
    assert differing(before, after, "eval_key") == {"full_st", "lora", "wise_ft"}


def test_other_test_items_change_scores_and_other_training_items_change_cells(home):
    before = plan_of(home)
    home.add_task("tiny_keep", "city", 0)
    upstream = plan_of(home)
    assert differing(before, upstream, "train_key") == set()
    assert differing(before, upstream, "eval_key") == {"full_st", "lora", "wise_ft"}
    home.add_task("tiny_learn", "city", 48)
    target = plan_of(home)
    assert differing(before, target, "train_key") == {"full_st", "lora", "wise_ft"}


def test_another_base_of_the_same_name_changes_everything(home):
    before = plan_of(home)
    shutil.copytree(Path(config_of(home)["bases"]["tiny"]["source"]["path"]), home.root / "base")
    edit(home.root / "base/config.json")
    bases = config_of(home)["bases"]
    bases["tiny"]["source"]["path"] = str(home.root / "base")
    after = plan_of(home, bases=bases)
    assert not set(before["id"]) & set(after["id"])
    assert not set(before["train_key"]) & set(after["train_key"])


@pytest.mark.parametrize(
    "change",
    [
        {"training": SUITE["training"] | {"steps": 7}},
        {"training": SUITE["training"] | {"batch_size": 8}},
        {"training": SUITE["training"] | {"weight_decay": 0.02}},
        {"training": SUITE["training"] | {"precision": "bf16"}},
        {"modules": ["q_proj"]},
    ],
    ids=str,
)
def test_settings_of_training_change_every_id(home, change):
    before, after = plan_of(home), plan_of(home, **change)
    assert len(before) == len(after)
    assert not set(before["id"]) & set(after["id"])
    assert not set(before["train_key"]) & set(after["train_key"])


def test_a_learning_rate_changes_the_ids_of_its_method_and_its_children(home):
    before = plan_of(home)
    methods = {"full_st": {"learning_rate": 0.5}, "lora": {}, "wise_ft": {}}
    after = plan_of(home, methods=methods)
    assert set(before.loc[~before["id"].isin(after["id"]), "method"]) == {"full_st", "wise_ft"}
    methods = {"full_st": {}, "lora": {"set": {"dropout": 0.1}}, "wise_ft": {}}
    after = plan_of(home, methods=methods)
    assert set(before.loc[~before["id"].isin(after["id"]), "method"]) == {"lora"}


@pytest.mark.parametrize(
    "change",
    [
        {"title": "Another title"},
        {"limits": {"minutes": 1, "memory_mb": 100}},
        {"training": SUITE["training"] | {"checkpoint_every": 1}},
        {"training": SUITE["training"] | {"threads": 2}},
        {"training": SUITE["training"] | {"device": "cpu"}},
        {"tuning": SUITE["tuning"] | {"factors": [1.0]}},
        {"seeds": [0, 1]},
    ],
    ids=str,
)
def test_what_changes_no_number_changes_no_key(home, change):
    before, after = plan_of(home), plan_of(home, **change)
    assert set(before["id"]) <= set(after["id"])
    for column in ("base_key", "data_key", "train_key", "eval_key"):
        assert differing(before, after, column) == set()


def test_the_number_of_items_scored_changes_scores_alone(home):
    before = plan_of(home)
    after = plan_of(home, evaluation=SUITE["evaluation"] | {"upstream": 6})
    assert set(before["id"]) == set(after["id"])
    assert differing(before, after, "train_key") == set()
    assert differing(before, after, "eval_key") == {"full_st", "lora", "wise_ft"}


def test_neither_time_nor_place_is_in_a_key(original, home):
    first, second = plan_of(original), plan_of(home)
    pd.testing.assert_frame_equal(first, second)


@pytest.mark.parametrize(
    "path",
    ["methods/lora.py", "workflow/tasks/tiny/tiny_keep.yaml", "data", "base", "config"],
)
def test_the_plan_is_made_anew_when_a_file_of_it_changes(original, tmp_path, path):
    """Data and base lie outside BALLAST_DATA here: their own places are looked at."""
    layout = Layout(original.root, tmp_path)
    config = config_of(original)
    key = plan_key(config, layout, tmp_path)
    assert plan_key(config, layout, tmp_path) == key
    if path == "config":
        assert plan_key(config | {"seeds": [5]}, layout, tmp_path) != key
        return
    place = {"data": "data/tiny_learn.train.jsonl", "base": "base/config.json"}.get(path, path)
    file = original.root / place
    text = file.read_bytes()
    try:
        file.write_bytes(text + b"\n")
        assert plan_key(config, layout, tmp_path) != key
    finally:
        file.write_bytes(text)


# Learning rates.


def rates(*rows: tuple[float, int, float | None, float | None, str], method="lora", rank=2):
    """A table as `tune` writes it, from (rate, seed, score, loss, status)."""
    who = ["tiny", "tiny_learn", method, "", rank]
    return pd.DataFrame([[*who, *row] for row in rows], columns=COLUMNS)


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        # The best mean over seeds, not the best single score.
        ([(0.1, 1, 90, 1, "ok"), (0.1, 2, 10, 1, "ok"), (0.2, 1, 60, 1, "ok")], 0.2),
        # Ties: the lower loss, then the smaller rate.
        ([(0.1, 1, 50, 2.0, "ok"), (0.2, 1, 50, 1.0, "ok"), (0.3, 1, 50, 3.0, "ok")], 0.2),
        ([(0.3, 1, 50, 1.0, "ok"), (0.1, 1, 50, 1.0, "ok"), (0.2, 1, 50, 1.0, "ok")], 0.1),
        # A rate that failed on one seed is not chosen, however good the other seed was.
        ([(0.3, 1, 99, 0, "ok"), (0.3, 2, None, None, "failed"), (0.1, 1, 40, 1, "ok")], 0.1),
        # Where all failed, something must still be tried.
        ([(0.3, 1, None, None, "failed"), (0.1, 1, None, None, "failed")], 0.1),
    ],
)
def test_the_rate_with_the_best_validation_score_is_chosen(rows, best):
    assert best_rates(rates(*rows))["learning_rate"].tolist() == [best]


def test_tuned_rates_are_picked_up_and_the_suites_own_goes_before_them(home):
    table = pd.concat(
        [
            rates((0.1, 100, 50, 1, "ok"), (0.3, 100, 80, 1, "ok")),
            rates((0.01, 100, 50, 1, "ok"), method="full_st", rank=None),
            rates((0.7, 100, 50, 1, "ok"), method="dora", rank=4),
        ]
    )
    table.to_csv(home.root / "config/rates.csv", index=False)
    methods = {
        "full_st": {},
        "lora": {"ranks": [2, 4]},
        "dora": {},
        "olora": {"learning_rate": 9.0},
    }
    plan = plan_of(home, methods=methods, learning_rates="rates.csv")
    specs = {(s["method"], s["rank"]): s for s in map(json.loads, plan["spec"])}
    found = {k: (s["learning_rate"], s["learning_rate_source"]) for k, s in specs.items()}
    assert found == {
        ("full_st", None): (0.01, "tuned"),
        ("lora", 2): (0.3, "tuned"),
        ("lora", 4): (0.001, "suite's start"),  # no rate was found for this rank
        ("dora", 2): (found["dora", 2][0], "method's default"),
        ("olora", 2): (9.0, "suite"),
    }


def test_a_table_of_rates_without_a_column_is_refused(tmp_path):
    rates((0.1, 1, 50, 1, "ok")).drop(columns="score").to_csv(tmp_path / "rates.csv")
    with pytest.raises(SuiteError, match="column 'score' is missing"):
        read_rates(tmp_path / "rates.csv")


def test_rates_survive_being_written_and_read(tmp_path):
    table = pd.concat([rates((0.1, 1, 50.0, 1.0, "ok")), rates((2e-5, 1, None, None, "failed"))])
    table.to_csv(tmp_path / "rates.csv", index=False)
    read = read_rates(tmp_path / "rates.csv")
    assert read["learning_rate"].tolist() == [0.1, 2e-5]
    assert read["variant"].tolist() == ["", ""]
    assert best_rates(read)[KEYS].to_dict("records") == best_rates(table)[KEYS].to_dict("records")


def test_tuning_gives_every_method_the_same_budget_on_validation_items(home):
    methods = {"full_st": {}, "lora": {"ranks": [2, 4]}, "dora": {}, "wise_ft": {}}
    tuning = {"factors": [0.3, 1.0, 3.0], "seeds": [100, 101], "start": {"lora": 0.01}}
    suite = load(home, methods=methods, tuning=tuning, seeds=[0, 1])
    plan = make_plan(suite)
    tune = make_tune_plan(suite, plan)
    points = tune.groupby(KEYS, dropna=False).size()
    assert set(points) == {6}
    assert set(tune["method"]) == {"full_st", "lora", "dora"}  # what trains
    assert set(tune["seed"]) == {100, 101}
    assert not set(tune["seed"]) & set(plan["seed"])
    assert tune["id"].is_unique
    assert not set(tune["id"]) & set(plan["id"])
    assert not set(tune["train_key"]) & set(plan["train_key"])
    for _, row in tune.iterrows():
        spec = json.loads(row["spec"])
        assert spec["split"] == "validation"
        splits = {name: entry["split"] for name, entry in spec["tasks"].items()}
        assert splits == {"tiny_learn": "validation", "tiny_keep": "test"}
        assert spec["folder"] == "tiny/tune"
    lora = tune[tune["method"] == "lora"]
    grid = {json.loads(spec)["learning_rate"] for spec in lora["spec"]}
    assert grid == {0.003, 0.01, 0.03}
    default = suite.methods["dora"].declaration.learning_rate
    dora = tune[tune["method"] == "dora"]
    assert default in {json.loads(spec)["learning_rate"] for spec in dora["spec"]}


def test_tuned_rates_do_not_move_the_grid_that_they_were_found_on(home):
    rates((0.3, 100, 80, 1, "ok")).to_csv(home.root / "config/rates.csv", index=False)
    grids = []
    for table in (None, "rates.csv"):
        suite = load(home, learning_rates=table)
        tune = make_tune_plan(suite, make_plan(suite))
        rates_of = [json.loads(spec)["learning_rate"] for spec in tune["spec"]]
        grids.append([rates_of, tune["id"].tolist(), tune["train_key"].tolist()])
    assert grids[0] == grids[1]


def test_the_table_of_rates_has_a_row_for_a_failed_cell():
    record = {
        "identity": {
            "base": "b", "target": "t", "method": "m", "variant": "", "rank": None, "seed": 1,
        },
        "settings": {"learning_rate": 0.1},
        "scores": {},
        "status": "failed",
    }  # fmt: skip
    table = rates_table([record])
    assert table["status"].tolist() == ["failed"]
    assert table["score"].isna().all()


# Size and imports.


@pytest.fixture(scope="module")
def large(original) -> list[str]:
    """Arguments for a suite of `CELLS` cells."""
    methods = ["lora", "dora", "pissa", "milora", "olora"]
    seeds = list(range(CELLS // len(methods) // 4))
    path = original.write_suite(
        "large", suite="large", methods=methods, ranks=[1, 2, 4, 8], seeds=seeds
    )
    return ["--configfile", str(path)]


def without_torch(home: Checkout) -> dict[str, str]:
    """An environment in which an import of torch or transformers ends the process."""
    folder = home.root / "forbidden"
    for name in ("torch", "transformers", "datasets", "lm_eval"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(f"raise SystemExit('{name} was imported')\n")
    environment = home.environment
    environment["PYTHONPATH"] = f"{folder}{os.pathsep}{environment['PYTHONPATH']}"
    return environment


def dry_run(home: Checkout, arguments: list[str], environment: dict[str, str]) -> tuple[str, float]:
    started = time.monotonic()
    done = subprocess.run(
        [str(BIN / "snakemake"), "-n", *arguments],
        cwd=home.root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, time.monotonic() - started


def test_planning_and_a_dry_run_of_many_cells_are_quick_and_need_no_torch(original, large):
    for method in (original.root / "methods").glob("*.py"):
        # A method that is imported, and not only read, ends the process as well.
        method.write_text(method.read_text() + "\nraise SystemExit('a method was imported')\n")
    environment = without_torch(original)
    output, seconds = dry_run(original, large, environment)
    assert re.search(rf"\bcell +{CELLS}\b", output)
    assert seconds < SECONDS, f"planning and a dry run took {seconds:.0f} s"
    output, seconds = dry_run(original, large, environment)
    assert re.search(rf"\bcell +{CELLS}\b", output)
    assert seconds < SECONDS, f"a dry run took {seconds:.0f} s"
    assert len(list(original.root.glob("results/large/plan/*.parquet"))) == 2


def test_the_probe_for_torch_works(original):
    done = subprocess.run(
        [sys.executable, "-c", "import torch"],
        env=without_torch(original),
        capture_output=True,
        text=True,
    )
    assert "torch was imported" in done.stderr
