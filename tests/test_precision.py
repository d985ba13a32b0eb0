"""The untouched base in the precision of its cells: its scores, its features, what E is made of."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from ballast.bases import micro_vlm
from ballast.damage import set_aside_damaged
from ballast.data import load_split
from ballast.errors import DataError
from ballast.files import write_json
from ballast.layout import Layout
from ballast.outcome import cell_folder, ready_base
from ballast.plan import make_plan
from ballast.ready import make_ready, spec_of_base
from ballast.records import validate_record
from ballast.sources import rows
from ballast.suite import load_suite
from ballast.tasks import read_tasks
from checkout import SUITE, Checkout

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# A step of this size leaves every weight as it was, also in fp32.
STILL = 1e-30


class Quiet:
    def note(self, line): ...
    def step(self, step, total, loss): ...


class Made:
    """A suite's plan and its base, ready."""

    def __init__(self, home: Checkout, file: str, base: dict, **changes) -> None:
        path = home.write_suite(file, bases={"tiny": base}, **changes)
        self.layout = Layout(home.root, home.root / "results")
        self.suite = load_suite(yaml.safe_load(path.read_text()), self.layout, path.parent)
        self.plan = make_plan(self.suite).set_index("id", drop=False)
        self.said: list[str] = []
        self.about = spec_of_base(self.plan, "tiny")
        self.ready = make_ready(
            **self.about,
            tasks=read_tasks(self.layout.tasks),
            layout=self.layout,
            report=self.said.append,
        )
        self.file = self.layout.suite(self.suite.name) / "bases/tiny.json"
        write_json(self.file, self.ready)

    def row(self, target: str, method: str) -> dict:
        chosen = (self.plan["target"] == target) & (self.plan["method"] == method)
        return self.plan[chosen].iloc[0].to_dict()

    def run(self, row: dict) -> tuple[dict, Path]:
        from ballast.cell import run_cell

        record, folder = run_cell(row, self.layout, Quiet()), cell_folder(row, self.layout)
        validate_record(record)
        write_json(folder / "run.json", record)
        return record, folder


TINY = {"source": {"path": "BASE"}, "upstream": ["tiny_keep"]}
METHODS = {"lora": {"learning_rate": STILL}, "full_st": {"learning_rate": 0.02}, "wise_ft": {}}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Checkout:
    made = Checkout(tmp_path_factory.mktemp("precision") / "home")
    made.save_base()
    # Large weights, so that rounding to bf16 shows.
    model = AutoModelForCausalLM.from_pretrained(made.root / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10 if weight.ndim == 2 else 1)
    model.save_pretrained(made.root / "base")
    made.add_task("tiny_other", "job", 24)
    return made


@pytest.fixture(scope="module")
def both(home) -> Made:
    """Targets of two precisions on one base."""
    targets = {"tiny_learn": {"precision": "fp32"}, "tiny_other": {"precision": "bf16"}}
    return Made(home, "both", TINY | {"targets": targets}, suite="both", methods=METHODS)


@pytest.fixture(scope="module")
def ran(both) -> dict:
    """By target and method: record and folder."""
    return {(row["target"], row["method"]): both.run(row) for row in both.plan.to_dict("records")}


@torch.no_grad()
def losses(home: Checkout, folder: str, precision: str) -> list[float]:
    """Nats per token of the true answers, one plain forward pass for each row."""
    model = AutoModelForCausalLM.from_pretrained(home.root / "base", dtype=KINDS[precision])
    tokenizer = AutoTokenizer.from_pretrained(home.root / "base")
    table, _ = load_split(Path(folder), "test")
    found = []
    for row in table:
        start = tokenizer.encode(row["prompt"], add_special_tokens=False)
        whole = tokenizer.encode(
            row["prompt"] + " " + row["choices"][row["answer"]], add_special_tokens=False
        )
        assert whole[: len(start)] == start
        assert len(whole) > len(start)
        logits = model.eval()(torch.tensor([whole])).logits[0, len(start) - 1 : -1]
        picked = logits.float().log_softmax(-1).double()
        picked = picked[torch.arange(len(picked)), whole[len(start) :]]
        found.append(float(-picked.mean()))
    return found


def items_of(entry: dict) -> list[float]:
    return pd.read_parquet(entry["items"]).sort_values("item")["loss"].tolist()


def test_a_base_is_scored_as_a_plain_pass_in_each_precision_is(home, both):
    found = {"fp32": both.ready["tasks"], **both.ready["lower_precisions"]}
    assert {precision: set(tasks) for precision, tasks in found.items()} == {
        "fp32": {"tiny_keep", "tiny_learn"},
        "bf16": {"tiny_keep", "tiny_other"},
    }
    for precision, tasks in found.items():
        for entry in tasks.values():
            assert np.allclose(
                items_of(entry), losses(home, entry["folder"], precision), atol=1e-4, rtol=0
            )
    full, half = found["fp32"]["tiny_keep"], found["bf16"]["tiny_keep"]
    assert full["folder"] == half["folder"]
    assert full["items"] != half["items"]
    assert np.abs(np.subtract(items_of(full), items_of(half))).max() > 0.01


def test_each_cell_is_compared_with_the_scores_of_its_own_precision(both, ran):
    for (target, _), (record, folder) in ran.items():
        tasks = both.ready["tasks"]
        if target == "tiny_other":
            tasks = both.ready["lower_precisions"]["bf16"]
        assert set(record["base_scores"]) == {"tiny_keep", target}
        for name, score in record["base_scores"].items():
            assert score == tasks[name]["scores"]
        items = pd.read_parquet(folder / "items.parquet")
        for name, part in items.groupby("task", observed=True):
            assert np.allclose(part["base_loss"], items_of(tasks[name]))


@pytest.mark.parametrize("target", ["tiny_learn", "tiny_other"])
def test_what_changes_nothing_has_learned_and_forgotten_exactly_nothing(ran, target):
    record, folder = ran[target, "lora"]
    assert record["scores"] == record["base_scores"]
    items = pd.read_parquet(folder / "items.parquet")
    assert (items["loss"] == items["base_loss"]).all()
    assert all(c["gained"] == c["forgotten"] == 0 for c in record["churn"].values())
    assert record["drift"]["kl"] == record["drift"]["weight_change"] == 0
    trained, _ = ran[target, "full_st"]
    assert trained["scores"] != trained["base_scores"]


@pytest.mark.parametrize("target", ["tiny_learn", "tiny_other"])
def test_on_the_way_back_what_changed_nothing_is_the_base_at_every_point(both, ran, target):
    from ballast.curves.rewind import run_rewind

    row = both.row(target, "lora")
    spec = json.loads(row["spec"])
    spec["curves"]["alphas"] = [0.3, 0.7]
    points = run_rewind(row | {"spec": json.dumps(spec)}, both.layout, Quiet())["points"]
    assert len(points) == 4
    for name, score in ran[target, "lora"][0]["base_scores"].items():
        for point in points:
            assert point["scores"][name]["loss"] == score["loss"]


def test_keys_and_files_of_fp32_know_nothing_of_other_precisions(home, both):
    """What a finished suite in fp32 has stays as it is when another precision comes."""
    targets = {"tiny_learn": {}, "tiny_other": {}}
    plain = Made(home, "plain", TINY | {"targets": targets}, suite="both", methods=METHODS)
    assert "lower_precisions" not in plain.ready
    assert plain.ready["tasks"]["tiny_keep"] == both.ready["tasks"]["tiny_keep"]
    assert not [line for line in plain.said if "untouched, tiny_keep" in line]
    for column in ("id", "train_key", "eval_key", "data_key"):
        assert plain.row("tiny_learn", "lora")[column] == both.row("tiny_learn", "lora")[column]
    was, now = (json.loads(m.row("tiny_other", "lora")["spec"]) for m in (plain, both))
    for name in was["tasks"]:
        assert was["tasks"][name]["eval_key"] != now["tasks"][name]["eval_key"]
        # Text has no features: its data serve every precision.
        assert was["tasks"][name]["data_key"] == now["tasks"][name]["data_key"]


def test_a_base_that_was_made_ready_in_another_precision_alone_is_refused(both):
    row = both.row("tiny_other", "lora")
    whole = both.file.read_text()
    try:
        write_json(both.file, {k: v for k, v in both.ready.items() if k != "lower_precisions"})
        with pytest.raises(DataError, match="was not made ready with tiny_keep"):
            ready_base(row, both.layout)
    finally:
        both.file.write_text(whole)


def test_missing_items_of_a_lower_precision_are_noticed_before_a_run(home):
    targets = {"tiny_learn": {"precision": "bf16"}}
    made = Made(home, "half", TINY | {"targets": targets}, suite="half", methods=METHODS)
    assert made.ready["tasks"] == {}
    items = Path(made.ready["lower_precisions"]["bf16"]["tiny_learn"]["items"])
    items.unlink()
    plan = made.plan.reset_index(drop=True)
    lines = set_aside_damaged(plan, plan.iloc[:0], made.layout, "half")
    assert len(lines) == 1
    assert str(items) in lines[0]
    assert not made.file.exists()


# --- images --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[Checkout, Made]:
    """A vision-language base whose two targets run in two precisions."""
    home = Checkout(tmp_path_factory.mktemp("pictures") / "home")
    torch.manual_seed(0)
    tokenizer = micro_vlm.build_tokenizer()
    micro_vlm.build_model(tokenizer).save_pretrained(home.root / "base")
    micro_vlm.build_processor(tokenizer).save_pretrained(home.root / "base")
    base = {"source": {"path": "BASE"}, "upstream": ["vlm_color"]}
    base["targets"] = {"vlm_icons": {"precision": "fp32"}, "vlm_inventory": {"precision": "bf16"}}
    training = SUITE["training"] | {"steps": 2, "examples": 8}
    return home, Made(home, "config", base, methods=METHODS, training=training)


def test_features_are_those_of_a_tower_in_the_precision_of_the_cells(pictures):
    home, made = pictures
    processor = micro_vlm.build_processor(micro_vlm.build_tokenizer()).image_processor
    source = {"reader": "world", "world": "micro-vlm", "task": "color"}
    shown = [row["image"] for row in rows(source, "test", 12)]
    seen = {}
    for precision, tasks in {"fp32": made.ready["tasks"], **made.ready["lower_precisions"]}.items():
        kind = KINDS[precision]
        model = AutoModelForImageTextToText.from_pretrained(home.root / "base", dtype=kind)
        pixels = processor(shown, return_tensors="pt")["pixel_values"].to(kind)
        with torch.no_grad():
            tower = model.eval().model.vision_tower
            wanted = tower(pixels, output_hidden_states=True).hidden_states[-1]
        folder = Path(tasks["vlm_color"]["folder"])
        stored = load_file(folder / "test.safetensors")["features"]
        table, _ = load_split(folder, "test")
        seen[precision] = stored[table["image"]]
        assert stored.dtype == kind
        bound = 1e-5 if precision == "fp32" else 0.05
        assert torch.allclose(seen[precision].float(), wanted.float(), atol=bound)
    assert not torch.equal(seen["fp32"].bfloat16(), seen["bf16"])


def test_cells_with_images_train_on_the_features_of_their_precision(pictures):
    _, made = pictures
    for target in ("vlm_icons", "vlm_inventory"):
        record, _ = made.run(made.row(target, "lora"))
        assert record["scores"] == record["base_scores"]
        assert record["drift"]["kl"] == 0


def test_keys_of_data_with_images_name_a_lower_precision(pictures):
    _, made = pictures
    full, half = (json.loads(made.row(t, "lora")["spec"])["tasks"]["vlm_color"]
                  for t in ("vlm_icons", "vlm_inventory"))  # fmt: skip
    for key in ("data_key", "train_key", "eval_key"):
        assert full[key] != half[key]
