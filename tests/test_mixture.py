"""Targets of several tasks, methods that need several targets, and equal budgets."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest
import torch
import yaml

from ballast.budget import label, parameters_within, parse_budget, resolve
from ballast.declare import read_method
from ballast.errors import DataError, SuiteError
from ballast.keep import keep_suite, read_kept
from ballast.layout import Layout
from ballast.plan import make_plan
from ballast.records import scan
from ballast.suite import load_suite
from ballast.training import Examples, joined, single_examples
from ballast.tune import make_tune_plan
from checkout import SUITE, Checkout
from tiny import METHODS, tuner_of

TIES = '''"""The mean of two parents, and which of them was the cell's own."""

from __future__ import annotations

from torch import Tensor

from ballast.context import PostHoc
from ballast.declare import Declaration

declaration = Declaration(
    title="Mean",
    citation="the tests",
    family="post-hoc",
    merges=True,
    several_targets=True,
    parents=("full_st",),
)


def post_hoc(ctx: PostHoc) -> dict[str, Tensor]:
    assert len(ctx.tuned) == 2
    for parent, tuned in enumerate(ctx.tuned):
        loss = [ctx.load(parent)(**batch).loss for batch in ctx.examples(parent, 2)]
        assert len(loss) == 2 and set(tuned) == set(ctx.tuned[0])
    name = sorted(ctx.tuned[0])[0]
    assert (ctx.model.state_dict()[name] == ctx.tuned[1][name]).all()
    return {key: (ctx.tuned[0][key] + ctx.tuned[1][key]) / 2 for key in ctx.tuned[0]}
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Checkout:
    made = Checkout(tmp_path_factory.mktemp("mixture") / "home")
    made.save_base()
    made.add_task("tiny_other", "drink", 40)
    (made.root / "methods/mean.py").write_text(TIES)
    base = SUITE["bases"]["tiny"] | {
        "targets": {
            "tiny_learn": {},
            "tiny_other": {},
            "both": {"tasks": ["tiny_learn", "tiny_other"], "steps": 4},
        }
    }
    made.write_suite(
        bases={"tiny": base},
        methods={
            "full_st": {},
            "lora": {"targets": ["both"]},
            "dora": {"targets": ["tiny_learn"], "budgets": ["20%", 4000]},
            "mean": {},
        },
    )
    return made


def plan_of(home, targets=None, **changes):
    config = yaml.safe_load((home.root / "config/config.yaml").read_text()) | changes
    if targets is not None:
        config["bases"]["tiny"]["targets"] = targets
    suite = load_suite(config, Layout(home.root, home.root / "results"))
    return suite, make_plan(suite)


def test_cells_of_mixtures_and_several_targets(home):
    suite, plan = plan_of(home)
    found = sorted(cell.rpartition("-")[0] for cell in plan["id"])
    assert found == sorted(
        f"tiny.{cell}.s0"
        for cell in (
            "tiny_learn.full_st",
            "tiny_other.full_st",
            "both.full_st",
            "both.lora-r2",
            "tiny_learn.dora+at-20pct",
            "tiny_learn.dora+at-4000",
            "tiny_learn.mean+of-full_st",
            "tiny_other.mean+of-full_st",
        )
    )
    by_target = plan[plan["method"] == "mean"].set_index("target")["parents"]
    assert by_target["tiny_learn"] == by_target["tiny_other"]
    assert len(by_target["tiny_learn"].split()) == 2
    tune = make_tune_plan(suite, plan)
    mixed = json.loads(tune[tune["target"] == "both"].iloc[0]["spec"])
    assert sorted(mixed["tasks"]) == ["tiny_keep", "tiny_learn", "tiny_other"]


def test_a_whole_run_scores_each_task_and_edits_parents_of_both_targets(home):
    home.snakemake()
    records = {
        (r["identity"]["target"], r["identity"]["method"], r["identity"]["variant"]): r
        for r in (
            json.loads(path.read_text())
            for path in (home.root / "results/tiny/cells").glob("*/run.json")
        )
    }
    assert {r["status"] for r in records.values()} == {"ok"}, [
        r["failure"] for r in records.values() if r["failure"]
    ]
    mixed = records["both", "lora", ""]
    assert {k for k, t in mixed["tasks"].items() if t["role"] == "target"} == {
        "tiny_learn",
        "tiny_other",
    }
    assert mixed["curve"]["steps"] == 4
    one, two = (records[t, "mean", "of-full_st"] for t in ("tiny_learn", "tiny_other"))
    assert one["files"]["adapter.safetensors"] == two["files"]["adapter.safetensors"]
    assert set(one["scores"]) == {"tiny_keep", "tiny_learn"}
    share = records["tiny_learn", "dora", "at-20pct"]
    assert share["report"]["resolved_parameters"] == share["costs"]["trainable_parameters"]
    assert share["report"]["budget_parameters"] == int(
        0.2 * (share["costs"]["total_parameters"] - share["costs"]["trainable_parameters"])
    )
    table = (home.root / "results/tiny/tables/tiny-both.md").read_text()
    row = next(line for line in table.splitlines() if "LoRA" in line)
    target = statistics.fmean(mixed["scores"][t]["value"] for t in ("tiny_learn", "tiny_other"))
    assert f"{target:.2f}" in row


def test_a_suite_is_kept_in_a_few_files(home, tmp_path):
    """Runs after the whole run above, on what it left."""
    suite = home.root / "results/tiny"
    assert keep_suite(suite, tmp_path) == 8
    records, items = read_kept(tmp_path)
    assert records == scan(suite / "cells")[0]
    for record in records:
        for task, score in record["scores"].items():
            own = items[(items["cell"] == record["id"]) & (items["task"] == task)]
            assert len(own) == score["n"]
            assert 100 * own["score"].mean() == pytest.approx(score["value"], abs=1e-4)
            assert int((own["base_score"] >= 0.5).sum()) == sum(
                record["churn"][task][part] for part in ("kept", "forgotten")
            )
    stored = next(suite.glob("cells/*/items.parquet"))
    stored.write_bytes(stored.read_bytes()[:-1])
    with pytest.raises(DataError, match="not the file that the record describes"):
        keep_suite(suite, tmp_path)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"tiny_learn": {"tasks": ["tiny_learn", "tiny_other"]}}, "a name that no task has"),
        ({"both": {"tasks": ["tiny_learn", "tiny_nothing"]}}, "tiny_nothing"),
        ({"both": {"tasks": ["tiny_learn"]}}, "both.tasks"),
        ({"both": {"tasks": ["tiny_learn", "tiny_keep"]}}, "both a target and an upstream"),
        (
            {"tiny_learn": {}, "both": {"tasks": ["tiny_learn", "tiny_other"], "examples": 8}},
            "tiny_learn stands in tiny_learn too",
        ),
    ],
)
def test_mixtures_that_cannot_be_are_refused(home, targets, message):
    with pytest.raises(SuiteError, match=message):
        plan_of(home, targets, methods={"lora": {}})


def test_several_targets_need_two(home):
    with pytest.raises(SuiteError, match=r"methods\.mean: no base .* two targets or more"):
        plan_of(home, ["tiny_learn"], methods={"full_st": {}, "mean": {}})
    _, plan = plan_of(home, ["tiny_learn"], methods="all")
    assert "mean" not in set(plan["method"])
    assert "mean on tiny" in plan.attrs["left_out"]


def _examples(first, count, task):
    return Examples(
        input_ids=[np.array([first, i]) for i in range(count)],
        prompt_lengths=[1] * count,
        pad=0,
        images=[i % 2 for i in range(count)],
        features=torch.full((2, 1, 3), float(first)),
        tasks=[task] * count,
    )


def test_joined_examples_keep_their_images_and_tasks():
    whole = joined([_examples(1, 3, "a"), _examples(2, 5, "b")])
    assert len(whole) == 8
    batch = whole.batch(np.array([2, 3]), torch.device("cpu"))
    assert batch["input_ids"][:, 0].tolist() == [1, 2]
    assert batch["pixel_values"][:, 0, 0].tolist() == [1.0, 2.0]
    for task, first in (("a", 1), ("b", 2)):
        found = list(single_examples(whole, 4, 0, torch.device("cpu"), task))
        assert len(found) == min(4, 3 if task == "a" else 5)
        assert {int(b["input_ids"][0, 0]) for b in found} == {first}


# Equal budgets.


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.5%", 500), (1234, 1234), ("64kB", 16000), ("1 MB", 250000), ("100", 100)],
)
def test_budgets(text, expected):
    assert parameters_within(text, 100_000) == expected


@pytest.mark.parametrize("text", ["", "0%", "-5", "many", "5 percent", "0", "1e4"])
def test_other_budgets_are_refused(text):
    with pytest.raises(SuiteError, match=r"budgets: .*0\.5%"):
        parse_budget(text)


def test_labels_are_fit_for_file_names():
    assert [label(text) for text in ("0.5%", 2000, "64 kB")] == ["at-0.5pct", "at-2000", "at-64kB"]


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_the_largest_rank_within_the_budget_is_taken(name, make_model):
    file = read_method(METHODS / f"{name}.py")
    counts = {}
    for rank in (3, 4):
        tuner = tuner_of(name, make_model("llama"), [], rank=rank)
        tuner.start()
        counts[rank] = tuner.trained_count()
    for asked, rank in ((counts[4] - 1, 3), (counts[4], 4), (counts[4] + 1, 4)):
        tuner = tuner_of(name, make_model("llama"), [])
        found = resolve(asked, tuner.method, file.declaration, tuner.ctx)
        assert tuner.ctx.rank == rank == found["resolved_size"]
        assert found["resolved_parameters"] == counts[rank] <= asked
    with pytest.raises(SuiteError, match="smallest size"):
        resolve(10, tuner.method, file.declaration, tuner.ctx)
