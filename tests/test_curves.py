"""Curves from base to finished cell, stability at equal specialization, the tuning budget."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from statistics import stdev

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy import stats

from ballast.cell import run_cell
from ballast.curves import (
    curve_cells,
    is_current,
    new_curve,
    point,
    read_curves,
    trajectory,
    write_curve,
)
from ballast.curves.curve_job import run_curve
from ballast.curves.equal import at_equal_specialization, crossings, frontier, levels_of
from ballast.curves.points import chosen_rows, undisturbed
from ballast.curves.rewind import move, run_rewind
from ballast.curves.trajectory import checkpoint_steps, run_trajectory
from ballast.errors import BallastError, SuiteError
from ballast.files import read_sealed, write_json, write_sealed
from ballast.layout import Layout
from ballast.outcome import ADAPTER, RECORD, failed_record
from ballast.plan import make_plan
from ballast.progress import Progress
from ballast.rates import COLUMNS, EXTRA, TUNING, best_rates, read_rates, tuning_table
from ballast.ready import make_ready, spec_of_base
from ballast.results import CURVE_COLUMNS
from ballast.suite import CURVES, load_suite
from ballast.tasks import read_tasks
from ballast.tune import make_tune_plan, rates_table, write_tuning
from checkout import SUITE, Checkout
from fake_results import fake_results

METHODS = {
    "full_st": {"learning_rate": 0.02},
    # Dropout: a trajectory that forgets to go back to training mode comes to another end.
    "lora": {"learning_rate": 0.02, "set": {"dropout": 0.3}},
    "prompt_tuning": {"learning_rate": 0.01, "set": {"tokens": 2}},
    "wise_ft": {},
}


class Home:
    """A tiny suite whose cells are finished, run in this process."""

    def __init__(self, root) -> None:
        made = Checkout(root)
        made.save_base()
        made.write_suite(methods=METHODS, evaluation=SUITE["evaluation"] | {"drift": False})
        self.layout = Layout(made.root, made.root / "results")
        self.config = yaml.safe_load((made.root / "config/config.yaml").read_text())
        self.suite = load_suite(self.config, self.layout)
        self.plan = make_plan(self.suite).set_index("id", drop=False)
        ready = make_ready(
            **spec_of_base(self.plan, "tiny"),
            tasks=read_tasks(self.layout.tasks),
            layout=self.layout,
            report=lambda line: None,
        )
        write_json(self.layout.suite("tiny") / "bases" / "tiny.json", ready)
        self.records = {method: self.run(self.row(method)) for method in METHODS}

    def row(self, method: str, **curves) -> dict:
        """The plan's row of a method, with other settings of its curves."""
        row = self.plan[self.plan["method"] == method].iloc[0].to_dict()
        spec = json.loads(row["spec"])
        spec["curves"] |= curves
        return row | {"spec": json.dumps(spec, sort_keys=True)}

    def run(self, row: dict) -> dict:
        record = run_cell(row, self.layout, Progress(row["id"]))
        folder = self.layout.cell(json.loads(row["spec"]).get("folder", "tiny"), row["id"])
        write_json(folder / RECORD, record)
        return record


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("curves") / "home")


def scores_of(block) -> dict:
    return {task: (s["value"], s["n"], s["loss"]) for task, s in block.items()}


def close(a: dict, b: dict) -> bool:
    """Whether two blocks of scores are the same but for rounding."""
    pairs = ((x, y) for task in a for x, y in zip(a[task], b[task], strict=True))
    return a.keys() == b.keys() and all(x == pytest.approx(y, abs=1e-5) for x, y in pairs)


# Rewinds.


@pytest.mark.parametrize("method", ["full_st", "lora", "wise_ft"])
def test_a_rewind_comes_from_the_base_to_the_cell(home, method):
    """Scored next to both ends, it gives what the record has there; in between something else."""
    record = home.records[method]
    curve = run_rewind(home.row(method, alphas=[1e-7, 0.5, 1 - 1e-7]), home.layout)
    shares = [at["share"] for at in curve["points"]]
    assert shares == [at["alpha"] for at in curve["points"]] == [0, 1e-7, 0.5, 1 - 1e-7, 1]
    base, near_base, middle, near_end, end = (scores_of(at["scores"]) for at in curve["points"])
    assert base == scores_of(record["base_scores"]) != scores_of(record["scores"])
    assert end == scores_of(record["scores"])
    assert close(near_base, base)
    assert close(near_end, end)
    assert not close(middle, base)
    assert not close(middle, end)


def test_wise_ft_is_the_middle_of_the_rewind_of_its_parent(home):
    """WiSE-FT with alpha 0.5 is a point of that curve: another implementation of the same."""
    spec = json.loads(home.row("wise_ft")["spec"])
    curve = run_rewind(home.row("full_st", alphas=[spec["hyper"]["alpha"]]), home.layout)
    middle = scores_of(curve["points"][1]["scores"])
    assert close(middle, scores_of(home.records["wise_ft"]["scores"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_move_by_their_share_and_exactly_to_both_ends(dtype):
    start, end = torch.randn(50, dtype=dtype), torch.randn(50, dtype=dtype)
    value = start.clone()
    move([(value, start, end)], 1.0)
    assert torch.equal(value, end)
    move([(value, start, end)], 0.25)
    expected = start.double() + 0.25 * (end.double() - start.double())
    assert torch.allclose(value.double(), expected, atol=torch.finfo(dtype).eps * 8)
    move([(value, start, end)], 0.0)
    assert torch.equal(value, start)


def test_a_method_that_does_not_merge_is_left_out_with_its_reason(home):
    curve = run_rewind(home.row("prompt_tuning"), home.layout)
    assert curve["left_out"] == "prompt_tuning does not merge into plain weights"
    assert curve["points"] == []
    cells, left = curve_cells(home.plan, "rewind")
    assert {home.plan.loc[cell, "method"] for cell in cells} == {"full_st", "lora", "wise_ft"}
    assert left == {"prompt_tuning": curve["left_out"]}


def test_an_adapter_that_is_not_the_records_is_refused(home, tmp_path):
    row = home.row("full_st")
    path = home.layout.cell("tiny", row["id"]) / ADAPTER
    whole = path.read_bytes()
    try:
        path.write_bytes(whole[:-4] + b"\0\1\0\1")
        with pytest.raises(BallastError, match="does not fit its checksum"):
            run_rewind(row, home.layout)
    finally:
        path.write_bytes(whole)


# Trajectories.


@pytest.mark.parametrize("method", ["full_st", "lora", "prompt_tuning"])
def test_a_trajectory_ends_at_the_cells_own_adapter(home, method):
    record = home.records[method]
    curve = run_trajectory(home.row(method, checkpoints=3), home.layout)
    assert curve["identical"] is True
    assert [at["step"] for at in curve["points"]] == [0, 2, 4, 6]
    assert [at["share"] for at in curve["points"]] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    found = [scores_of(at["scores"]) for at in curve["points"]]
    assert found[0] == scores_of(record["base_scores"])
    assert found[-1] == scores_of(record["scores"])
    assert not close(found[1], found[0])
    assert not close(found[2], found[3])


def test_a_trajectory_that_ends_elsewhere_says_so_and_scores_that_end(home, monkeypatch):
    """A scoring that leaves the model in evaluation mode switches LoRA's dropout off."""
    call = trajectory.Scorer.__call__

    def careless(self):
        found = call(self)
        self.work.base.model.eval()
        return found

    monkeypatch.setattr(trajectory.Scorer, "__call__", careless)
    curve = run_trajectory(home.row("lora", checkpoints=3), home.layout)
    assert curve["identical"] is False
    assert not close(
        scores_of(curve["points"][-1]["scores"]), scores_of(home.records["lora"]["scores"])
    )


def test_a_point_on_the_way_is_that_of_a_cell_stopped_there(home):
    """Training with a constant rate for 4 of 6 steps gives the trajectory's point at step 4."""
    config = home.config | {"methods": {"full_st": METHODS["full_st"]}}
    runs = {}
    for steps in (4, 6):
        training = config["training"] | {"schedule": "constant", "warmup": 0.0, "steps": steps}
        plan = make_plan(load_suite(config | {"training": training}, home.layout))
        row = plan.iloc[0].to_dict()
        runs[steps] = row, home.run(row)
    row = runs[6][0]
    spec = json.loads(row["spec"])
    spec["curves"] |= {"checkpoints": 3}
    curve = run_trajectory(row | {"spec": json.dumps(spec)}, home.layout)
    at = next(at for at in curve["points"] if at["step"] == 4)
    assert close(scores_of(at["scores"]), scores_of(runs[4][1]["scores"]))


def test_scoring_leaves_modes_and_random_states_alone():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    model.train()
    model[1].eval()  # frozen parts of a method stay as they are

    def draw():
        return torch.rand(3).tolist(), np.random.rand(), random.random()

    def seed():
        torch.manual_seed(3), np.random.seed(3), random.seed(3)

    seed()
    expected = draw()
    seed()
    with undisturbed(model):
        assert not any(module.training for module in model.modules())
        assert draw() == expected
        draw()
    assert [module.training for module in model.modules()] == [True, True, False]
    assert draw() == expected


def test_a_post_hoc_cell_has_no_trajectory(home):
    curve = run_trajectory(home.row("wise_ft"), home.layout)
    assert curve["left_out"] == "wise_ft is post-hoc: nothing is trained"
    assert "wise_ft" in curve_cells(home.plan, "trajectory")[1]


@pytest.mark.parametrize(
    ("total", "count", "steps"),
    [(200, 5, [40, 80, 120, 160, 200]), (7, 3, [2, 5, 7]), (2, 5, [1, 2]), (9, 1, [9])],
)
def test_checkpoints_are_evenly_spaced_and_end_at_the_end(total, count, steps):
    assert checkpoint_steps(total, count) == steps


# Some of the items.


def test_points_on_some_items_agree_with_the_stored_items(home):
    """The ends come from stored items, what is between is scored: next to an end both agree."""
    row = home.row("full_st", items=5, alphas=[1e-7, 1 - 1e-7])
    curve = run_rewind(row, home.layout)
    base, near_base, near_end, end = (scores_of(at["scores"]) for at in curve["points"])
    assert {n for _, n, _ in end.values()} == {5}
    assert close(near_base, base)
    assert close(near_end, end)
    assert not close(base, end)
    path = home.layout.cell("tiny", row["id"]) / "samples/tiny_learn.parquet"
    items = pd.read_parquet(path).set_index("item").loc[chosen_rows(12, 5)]
    assert end["tiny_learn"][0] == pytest.approx(100 * items["score"].mean())
    assert end["tiny_learn"][2] == pytest.approx(np.average(items["loss"], weights=items["tokens"]))


def test_the_same_items_are_chosen_always():
    assert chosen_rows(10, None) is chosen_rows(10, 10) is chosen_rows(10, 99) is None
    rows = chosen_rows(1000, 50)
    assert rows == chosen_rows(1000, 50) == sorted(set(rows))
    assert len(rows) == 50
    assert max(rows) > 500


# Files.


@pytest.fixture
def written(home):
    """The full_st cell's rewind, written."""
    path = run_curve(home.row("full_st", alphas=[0.5]), home.layout, "rewind")
    yield path
    path.unlink(missing_ok=True)


def test_curves_are_read_as_a_table_of_points(home, written):
    record = home.records["full_st"]
    for task, value in (("tiny_learn", 75.0), ("tiny_keep", 12.5)):
        edited(written, lambda c, t=task, v=value: c["points"][1]["scores"][t].update(value=v))
    table = read_curves(home.layout.suite("tiny"), [record])
    before = {name: score["value"] for name, score in record["base_scores"].items()}
    assert table["E"].iloc[1] == 75 - before["tiny_learn"] != 0
    assert table["F"].iloc[1] == 12.5 - before["tiny_keep"] != 0
    assert list(table)[: len(CURVE_COLUMNS)] == list(CURVE_COLUMNS)
    assert table["share"].tolist() == table["alpha"].tolist() == [0, 0.5, 1]
    assert table["step"].isna().all()
    ends = table.iloc[[0, 2]]
    gain = {
        k: record["scores"][k]["value"] - record["base_scores"][k]["value"]
        for k in record["scores"]
    }
    assert ends["E"].tolist() == pytest.approx([0, gain["tiny_learn"]])
    assert ends["F"].tolist() == pytest.approx([0, gain["tiny_keep"]])
    assert ends["target_mean"].iloc[1] == record["scores"]["tiny_learn"]["value"]
    assert ends["score.tiny_keep"].iloc[1] == record["scores"]["tiny_keep"]["value"]
    assert table.attrs["problems"] == []


def test_a_curve_is_made_once_and_again_when_its_settings_change(home, written):
    row = home.row("full_st", alphas=[0.5])
    assert is_current(row, home.layout, "rewind")
    assert not is_current(row, home.layout, "trajectory")
    assert not is_current(home.row("full_st", alphas=[0.4]), home.layout, "rewind")
    assert not is_current(row | {"eval_key": "other"}, home.layout, "rewind")
    first = written.read_bytes()
    write_sealed(written, read_sealed(written) | {"identical": False})
    run_curve(row, home.layout, "rewind")
    assert b'"identical": false' in written.read_bytes()
    written.unlink()
    run_curve(row, home.layout, "rewind")
    assert written.read_bytes() == first


def edited(path, change) -> None:
    curve = read_sealed(path)
    change(curve)
    path.write_text(json.dumps(curve))  # as an earlier version would have, without a checksum


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["keys"].update(train="older"), "stale"),
        (lambda c: c["keys"].update(eval="older"), "stale"),
        (lambda c: c.update(cell="<script>"), "holds the curve of <script>"),
        (lambda c: c.pop("points"), "'points' is a required property"),
        (lambda c: c["points"][1].update(share=7), "share"),
        (lambda c: c["points"][1]["scores"].pop("tiny_keep"), "tasks are not those"),
        (lambda c: c["points"][1]["scores"]["tiny_keep"].update(value=float("nan")), "finite"),
    ],
)
def test_curves_that_cannot_be_trusted_are_left_out_and_named(home, written, change, problem):
    edited(written, change)
    table = read_curves(home.layout.suite("tiny"), home.records.values())
    assert table.empty
    assert list(table) == list(CURVE_COLUMNS)
    (line,) = table.attrs["problems"]
    assert problem in line
    assert written.name in line
    assert "\n" not in line


def test_a_damaged_curve_and_one_without_a_record_are_named(home, written):
    assert "no record" in read_curves(home.layout.suite("tiny"), {}).attrs["problems"][0]
    written.write_text("{")
    assert "damaged" in read_curves(home.layout.suite("tiny"), []).attrs["problems"][0]


def test_a_cell_that_is_missing_or_stale_has_to_be_run_first(home):
    for change in ({"id": "absent"}, {"train_key": "other"}, {"eval_key": "other"}):
        with pytest.raises(BallastError, match="run the suite first"):
            run_curve(home.row("lora") | change, home.layout, "rewind")


def test_a_failed_cell_has_a_curve_without_points(home):
    row = home.row("lora")
    record = failed_record(row, home.layout, "diverged", "step 3: loss nan", 1)
    curve = new_curve(row, "trajectory", record)
    assert curve["left_out"] == "the cell failed: diverged: step 3: loss nan"
    path = write_curve(curve, row, home.layout)
    table = read_curves(home.layout.suite("tiny"), [record])
    path.unlink()
    assert table.empty
    assert table.attrs["problems"] == []


def test_curves_of_a_suite_are_checked_and_change_no_cell(home):
    suite = load_suite(home.config | {"curves": {"items": 4, "methods": ["lora"]}}, home.layout)
    assert suite.config["curves"] == CURVES | {"items": 4, "methods": ["lora"]}
    plan = make_plan(suite).set_index("id", drop=False)
    for key in ("id", "train_key", "eval_key"):
        assert plan[key].tolist() == home.plan[key].tolist()
    assert {plan.loc[c, "method"] for c in curve_cells(plan, "rewind")[0]} == {"lora"}
    for bad, said in (
        ({"methods": ["loar"]}, "did you mean 'lora'"),
        ({"alphas": [1.0]}, "curves.alphas"),
        ({"checkpoint": 3}, "checkpoints"),
    ):
        with pytest.raises(SuiteError, match=said):
            load_suite(home.config | {"curves": bad}, home.layout)


# Equal specialization.


def curve_of(cell: str, e: list[float], f: list[float], kind: str = "rewind") -> pd.DataFrame:
    points = {"cell": cell, "kind": kind, "share": np.linspace(0, 1, len(e)), "E": e, "F": f}
    return pd.DataFrame(points).reindex(columns=list(CURVE_COLUMNS))


@pytest.mark.parametrize(
    ("e", "f", "level", "expected"),
    [
        ([0, 10, 20], [0, -2, -8], 5, -1.0),  # half of the first stretch
        ([0, 10, 20], [0, -2, -8], 10, -2.0),  # a point itself
        ([0, 10, 20], [0, -2, -8], 17.5, -6.5),
        ([0, 10, 20], [0, -2, -8], 20, -8.0),
        ([0, 10, 20], [0, -2, -8], 20.1, np.nan),  # never
        ([0, 30, 5, 40], [0, -3, -9, -50], 20, -2.0),  # the first of three crossings
        ([0, -5, 15], [0, -4, -8], 5, -6.0),  # from below the base
        ([0, 30, 5], [0, -3, -9], 20, -2.0),  # gone again at the end
        ([0, 12, 12, 30], [0, -6, -20, -30], 12, -6.0),  # a plateau: where it begins
        ([5, 8], [-1, -2], 5, -1.0),  # reached at the first point
    ],
)
def test_the_first_crossing_is_interpolated(e, f, level, expected):
    found = crossings(curve_of("a", e, f), level)
    assert found.index.tolist() == ["a"]
    assert found["a"] == pytest.approx(expected, nan_ok=True)


def test_crossings_agree_with_numpy_on_rising_curves_of_many_cells():
    draw = np.random.default_rng(1)
    parts, expected = [], {}
    for number in range(200):
        e = np.cumsum(np.concatenate([[0], draw.uniform(1, 20, 5)]))
        f = np.concatenate([[0], draw.normal(-10, 5, 5)])
        parts.append(curve_of(f"c{number}", e, f))
        expected[f"c{number}"] = np.interp(40, e, f) if e[-1] >= 40 else np.nan
    shuffled = pd.concat(parts).sample(frac=1, random_state=0)
    found = crossings(shuffled, 40)
    assert found.isna().any()
    assert found.notna().any()
    for cell, value in expected.items():
        assert found[cell] == pytest.approx(value, nan_ok=True)


def with_curves(results, curves: dict[tuple[str, int], pd.DataFrame], **changes):
    """Results whose curves are those given by (method, seed)."""
    frames = []
    for (method, seed), frame in curves.items():
        chosen = (results.table["method"] == method) & (results.table["seed"] == seed)
        frames.append(frame.assign(cell=results.table.loc[chosen, "id"].iloc[0]))
    empty = pd.DataFrame(columns=list(CURVE_COLUMNS))
    return replace(results, curves=pd.concat(frames) if frames else empty, **changes)


@pytest.fixture
def fake():
    return fake_results(methods=2, ranks=(None,), seeds=4)


def test_rows_are_means_over_the_seeds_that_reached_the_level(fake):
    curves = {
        ("lora", 0): curve_of("", [0, 10, 20], [0, -2, -8]),
        ("lora", 1): curve_of("", [0, 20], [0, -10]),
        ("lora", 2): curve_of("", [0, 12], [0, -4]),
        ("lora", 3): curve_of("", [0, 4], [0, -40]),
    }
    # A cell that has both kinds counts with its trajectory.
    both = curve_of("", [0, 40, 40, 40, 40], [0, -99, -99, -99, -99])
    results = with_curves(fake, curves)
    cell = results.curves["cell"].iloc[0]
    curves = pd.concat([results.curves.assign(kind="trajectory"), both.assign(cell=cell)])
    results = replace(results, curves=curves)
    rewinds = at_equal_specialization(results, *fake.places()[0], (10,), kinds=("rewind",))
    assert rewinds.loc["lora", "F@10"] == pytest.approx(-99 / 4)
    assert rewinds.attrs["kinds"] == ["rewind"]
    found = at_equal_specialization(results, *fake.places()[0], (10, 15))
    assert found.attrs["kinds"] == ["trajectory"]
    row, values = found.loc["lora"], [-2, -5, -4 * 10 / 12]
    assert row["F@10"] == pytest.approx(np.mean(values))
    half = stats.t.ppf(0.975, 2) * stdev(values) / 3**0.5
    assert row["F@10.low"] == pytest.approx(np.mean(values) - half)
    assert row["F@10.high"] == pytest.approx(np.mean(values) + half)
    assert row["reached@10"] == 3 / 4
    assert row["F@15"] == pytest.approx(np.mean([-5, -7.5]))
    assert row["reached@15"] == 2 / 4


def test_one_seed_that_reached_it_has_no_interval(fake):
    curves = {("lora", s): curve_of("", [0, 10 * (s == 0)], [0, -5]) for s in range(4)}
    row = at_equal_specialization(with_curves(fake, curves), *fake.places()[0], (10,)).loc["lora"]
    assert row["F@10"] == -5
    assert row["reached@10"] == 0.25
    assert np.isnan(row["F@10.low"])
    assert np.isnan(row["F@10.high"])


def test_cells_without_a_curve_say_only_what_their_end_says(fake):
    """Below the level: not reached; there: reached; beyond: not known, and no part of a share."""
    table = fake.table.copy()
    lora = table["method"] == "lora"
    table.loc[lora, "E"] = [5.0, 5.0, 10.0, 30.0]
    table.loc[lora, "F"] = [-1.0, -1.0, -7.0, -20.0]
    found = at_equal_specialization(with_curves(fake, {}, table=table), *fake.places()[0], (10, 40))
    assert found.loc["lora", "F@10"] == -7
    assert found.loc["lora", "reached@10"] == pytest.approx(1 / 3)
    assert found.loc["lora", "reached@40"] == 0
    assert np.isnan(found.loc["lora", "F@40"])
    beyond = at_equal_specialization(with_curves(fake, {}, table=table), *fake.places()[0], (1,))
    assert np.isnan(beyond.loc["lora", "reached@1"])


def test_failed_seeds_are_no_part_of_a_share(fake):
    curves = {("lora", s): curve_of("", [0, 20], [0, -10]) for s in range(4)}
    results = with_curves(fake, curves)
    table = results.table.copy()
    failed = (table["method"] == "lora") & (table["seed"] == 3)
    table.loc[failed, "status"] = "failed"
    found = at_equal_specialization(replace(results, table=table), *fake.places()[0], (10,))
    assert found.loc["lora", "reached@10"] == 1
    assert len(found.columns) == 4


def test_levels_are_shares_of_what_the_base_can_gain(fake):
    where = fake.places()[0]
    before = fake.table["target_mean"].iloc[0] - fake.table["E"].iloc[0]
    assert levels_of(fake, *where) == (round(0.5 * (100 - before)), round(0.8 * (100 - before)))
    full = fake.table.assign(E=0.0, target_mean=100.0)
    assert levels_of(replace(fake, table=full), *where) == ()


def test_ten_thousand_cells_take_seconds(fake):
    def copies(frame, *names):
        return pd.concat(
            [frame.assign(**{k: frame[k] + f"-{i}" for k in names}) for i in range(1250)],
            ignore_index=True,
        )

    results = replace(
        fake, table=copies(fake.table, "id", "method"), curves=copies(fake.curves, "cell")
    )
    started = time.process_time()
    found = at_equal_specialization(results, *results.places()[0], (10,))
    assert len(found) == 2500
    assert len(frontier(results, *results.places()[0])) == 5000
    assert time.process_time() - started < 20
    small = at_equal_specialization(fake, *fake.places()[0], (10,))
    assert found["F@10"].to_numpy().reshape(1250, 2) == pytest.approx(
        np.tile(small["F@10"], (1250, 1)), nan_ok=True
    )


# Frontiers.


def brute_front(points: np.ndarray) -> list[bool]:
    return [
        not any((other >= own).all() and (other > own).any() for other in points) for own in points
    ]


def test_the_frontier_has_every_point_of_a_method(fake):
    where = fake.places()[0]
    draw = np.random.default_rng(0)
    rates = pd.DataFrame(
        [
            [*where, "lora", "", None, rate, seed, 50.0, 1.0, "ok", *draw.integers(0, 5, 2), False]
            for rate in (0.1, 0.2, 0.3)
            for seed in (100, 101)
        ],
        columns=[*COLUMNS, *EXTRA],
    )
    rates.loc[0, "status"] = "failed"
    curves = {("lora", s): curve_of("", [0, s, 20], [0, -s, -8]) for s in range(3)}
    found = frontier(with_curves(fake, curves, rates=rates), *where)
    lora = found[found["method"] == "lora"]
    assert lora["source"].value_counts().to_dict() == {"tune": 3, "results": 1, "rewind": 1}
    rewind = lora[lora["source"] == "rewind"].iloc[0]
    assert (rewind["E"], rewind["F"], rewind["n"], rewind["share"]) == (1, -1, 3, 0.5)
    tune = lora[lora["source"] == "tune"].set_index("learning_rate")
    assert tune["n"].to_dict() == {0.1: 1, 0.2: 2, 0.3: 2}  # the failed cell has no point
    mean = rates[rates["learning_rate"] == 0.2][["E", "F"]].mean()
    assert tune.loc[0.2, ["E", "F"]].tolist() == mean.tolist()
    end = lora[lora["source"] == "results"].iloc[0]
    cells = fake.table[fake.table["method"] == "lora"]
    assert end["E"] == pytest.approx(cells["E"].mean())
    assert end["n"] == 4
    assert lora["front"].tolist() == brute_front(lora[["E", "F"]].to_numpy())


def test_the_front_agrees_with_brute_force(fake):
    from ballast.curves.equal import _front

    draw = np.random.default_rng(2)
    for size in (1, 2, 10, 60):
        points = draw.integers(0, 6, (size, 2)).astype(float)  # many ties
        assert _front(*points.T).tolist() == brute_front(points)


def test_without_rates_and_curves_the_ends_are_left(fake):
    found = frontier(with_curves(fake, {}), *fake.places()[0])
    assert set(found["source"]) == {"results"}
    assert len(found) == 2
    assert frontier(with_curves(fake, {}), "no", "where").empty


# The tuning budget.


def rates_of(*rows, method: str = "lora") -> pd.DataFrame:
    """Rows of (rate, seed, score, status, E, F, default)."""
    who = ["tiny", "tiny_learn", method, "", 2]
    made = [[*who, rate, s, score, 1.0, state, *rest] for rate, s, score, state, *rest in rows]
    return pd.DataFrame(made, columns=[*COLUMNS, *EXTRA])


GRID = (
    (0.1, 100, 40.0, "ok", 30.0, -1.0, False),
    (0.3, 100, 70.0, "ok", 60.0, -9.0, True),
    (0.9, 100, 90.0, "ok", 80.0, -60.0, False),
)


def test_upstream_scores_have_no_part_in_the_choice():
    table = rates_of(*GRID)
    chosen = best_rates(table)["learning_rate"].tolist()
    assert chosen == [0.9]
    for f in ([0.0, -50.0, -100.0], [-100.0, 0.0, 50.0], [np.nan] * 3):
        assert best_rates(table.assign(F=f, E=f))["learning_rate"].tolist() == chosen


def test_the_tuning_table_by_hand():
    row = tuning_table(rates_of(*GRID)).iloc[0]
    assert (row["default_rate"], row["default"], row["rate"], row["tuned"]) == (0.3, 70, 0.9, 90)
    assert (row["gain"], row["rates"], row["seeds"], row["failed"]) == (20, 3, 1, 0)
    assert row["sensitivity"] == pytest.approx((50 + 20 + 0) / 3)
    assert row["at_edge"]
    assert (row["F.default"], row["F.tuned"]) == (-9, -60)
    middle = tuning_table(rates_of(GRID[0], (0.3, 100, 95.0, "ok", 85.0, 0.0, True), GRID[2]))
    assert not middle.iloc[0]["at_edge"]
    assert middle.iloc[0]["gain"] == 0
    assert not tuning_table(rates_of(GRID[1])).iloc[0]["at_edge"]  # a grid of one has no edge


def test_the_tuning_table_is_written_rounded(tmp_path):
    small = rates_of(*((rate / 1e4, *rest) for rate, *rest in GRID))
    write_tuning(small, tmp_path / "tuning.csv")
    table = pd.read_csv(tmp_path / "tuning.csv")
    assert table[["default_rate", "rate"]].iloc[0].tolist() == pytest.approx([3e-5, 9e-5])
    assert list(table) == list(TUNING)
    assert table["sensitivity"].tolist() == [23.333]


def test_a_failed_rate_counts_as_the_untouched_base():
    failed = (2.7, 100, None, "failed", None, None, False)
    row = tuning_table(rates_of(*GRID, failed)).iloc[0]
    assert row["failed"] == 1
    assert row["rate"] == 0.9
    assert not row["at_edge"]
    assert row["sensitivity"] == pytest.approx((50 + 20 + 0 + 80) / 4)  # the base had 10
    unknown = rates_of(*GRID, failed).assign(E=np.nan)
    assert tuning_table(unknown).iloc[0]["sensitivity"] == pytest.approx(70 / 3)
    lost = tuning_table(rates_of(failed)).iloc[0]
    assert np.isnan(lost["tuned"])
    assert np.isnan(lost["gain"])
    assert np.isnan(lost["sensitivity"])


def test_means_over_seeds_are_taken_before_rates_are_compared():
    rows = [(r, s, v, "ok", v, 0.0, r == 0.1) for r, s, v in
            ((0.1, 1, 90.0), (0.1, 2, 10.0), (0.2, 1, 60.0), (0.2, 2, 60.0))]  # fmt: skip
    row = tuning_table(rates_of(*rows)).iloc[0]
    assert (row["default"], row["tuned"], row["rate"], row["seeds"]) == (50, 60, 0.2, 2)
    assert row["sensitivity"] == pytest.approx(5)


def test_old_tables_of_rates_are_still_read(tmp_path):
    rates_of(*GRID).drop(columns=EXTRA).to_csv(tmp_path / "old.csv", index=False)
    rates_of(*GRID).to_csv(tmp_path / "new.csv", index=False)
    old, new = read_rates(tmp_path / "old.csv"), read_rates(tmp_path / "new.csv")
    assert old[EXTRA].isna().all(axis=None)
    assert new["default"].tolist() == [False, True, False]
    assert new["E"].tolist() == [30, 60, 80]
    row = tuning_table(old).iloc[0]
    assert pd.isna(row["default_rate"])
    assert pd.isna(row["default"])
    assert row["tuned"] == 90
    assert best_rates(old)["learning_rate"].tolist() == best_rates(new)["learning_rate"].tolist()


def test_a_cell_of_tune_is_compared_on_validation_and_scored_upstream(home):
    plan = make_tune_plan(home.suite, make_plan(home.suite))
    row = plan[plan["method"] == "lora"].iloc[1].to_dict()
    record = home.run(row)
    ready = json.loads((home.layout.suite("tiny") / "bases/tiny.json").read_text())
    base = ready["tasks"]["tiny_learn"]
    assert record["base_scores"]["tiny_learn"] == base["validation_scores"] != base["scores"]
    assert record["base_scores"]["tiny_keep"] == ready["tasks"]["tiny_keep"]["scores"]
    for name, score in record["scores"].items():
        assert score["n"] == record["base_scores"][name]["n"]
    assert record["scores"]["tiny_learn"]["n"] < record["scores"]["tiny_keep"]["n"] == 12
    table = rates_table([record]).iloc[0]
    value = record["scores"]["tiny_learn"]["value"]
    assert table["score"] == value
    assert table["E"] == pytest.approx(value - base["validation_scores"]["value"])
    assert table["F"] == pytest.approx(
        record["scores"]["tiny_keep"]["value"] - record["base_scores"]["tiny_keep"]["value"]
    )
    assert table["default"]  # the second of the factors 0.5 and 1
    other = plan[plan["method"] == "lora"].iloc[0]
    assert json.loads(other["spec"])["learning_rate_source"] == "grid"
    # As cells of the time before were: targets alone, against the base's test items.
    old = record | {k: {"tiny_learn": record[k]["tiny_learn"]} for k in ("scores", "tasks")}
    assert rates_table([old]).iloc[0][["E", "F"]].isna().all()


def test_points_need_only_what_a_record_of_scores_has():
    at = point(0.5, {"t": {"value": 1.0, "n": 2, "loss": None, "answered": 3.0}}, step=4)
    scores = {"t": {"value": 1.0, "n": 2, "loss": None}}
    assert at == {"share": 0.5, "step": 4, "alpha": None, "scores": scores}
