"""Limits: what a suite says, what its bases say, and what follows from a base's size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ballast.errors import SuiteError
from ballast.forecast.architecture import network
from ballast.forecast.bases import BaseSize, base_size
from ballast.forecast.machine import Machine
from ballast.forecast.need import cell_need
from ballast.layout import Layout
from ballast.limits import KEYS, LEAST, LEAST_BASE, base_limits, cell_limits, gpus_of, limits_at
from ballast.plan import make_plan
from ballast.suite import TRAINING, load_suite, read_config
from ballast.tasks import read_tasks
from ballast.tune import make_tune_plan
from checkout import REPOSITORY

LAYOUT = Layout(REPOSITORY, Path("nowhere"))
TASKS = read_tasks(LAYOUT.tasks)
SEVEN = {"model_type": "llama"}  # its class's defaults are LLaMA-7B
SMALL = network({"model_type": "llama", "vocab_size": 200, "hidden_size": 96,
                 "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "max_position_embeddings": 64})  # fmt: skip


def size(config: dict | None = None) -> BaseSize:
    found = network(config) if config else SMALL
    return BaseSize(found, found.parameters, "a test")


def spec(family: str = "reparameterization", **training) -> dict:
    sizes = {"test": 500, "validation": 200, "train": None}
    return {
        "family": family,
        "method": {"reparameterization": "lora", "selective": "full_st"}.get(family, "wise_ft"),
        "rank": 8,
        "modules": "all",
        "connector": "frozen",
        "target": "lm_dialect",
        "training": TRAINING | training,
        "evaluation": {"batch_size": 128},
        "tasks": {"lm_dialect": {"role": "target", "sizes": sizes, "max_length": 512}},
    }


def limits(of: dict, base: BaseSize, own: dict | None = None) -> dict:
    return cell_limits(of, base, TASKS, own or {})


def ready(own: dict) -> dict:
    """Limits of making a small base ready."""
    return base_limits({"path": "x"}, spec()["tasks"], [TRAINING], 128, size(), TASKS, own)


def plan(**changes):
    """Specs of the cells of the default suite without limits of its own, changed."""
    config = {
        k: v for k, v in read_config(REPOSITORY / "config/config.yaml").items() if k != "limits"
    }
    config["methods"] = {"lora": {"ranks": [8]}, "full_st": {}}
    base = changes.pop("base", {})
    config["bases"]["micro-lm"] = config["bases"]["micro-lm"] | base
    made = make_plan(load_suite(config | changes, LAYOUT))
    return {row["base"]: json.loads(row["spec"]) for _, row in made.iterrows()}


def test_the_bases_own_limits_come_before_the_suites_and_those_before_the_computed():
    specs = plan(limits={"minutes": 7, "gpus": 0}, base={"limits": {"minutes": 90}})
    lm, vlm = (specs[base]["limits"] for base in ("micro-lm", "micro-vlm"))
    assert (lm["minutes"], vlm["minutes"]) == (90, 7)
    assert lm["gpus"] == vlm["gpus"] == 0
    assert lm["memory_mb"] == vlm["memory_mb"] == LEAST["memory_mb"]
    for found in specs.values():
        assert set(found["limits"]) == set(found["base_limits"]) == set(KEYS)


def test_small_bases_get_the_least():
    assert limits(spec(), size()) == LEAST | {"gpus": 0}
    assert ready({}) == LEAST_BASE | {"gpus": 0}


def test_a_base_gets_no_less_time_than_its_cells_are_given():
    own = {"minutes": 500, "memory_mb": 9000}
    assert ready(own) == own | {"gpus": 0}


def test_gpus_follow_from_the_device_and_the_size():
    large = size(SEVEN)
    assert [gpus_of(large, device) for device in ("auto", "cuda", "cpu")] == [1, 1, 0]
    assert [gpus_of(size(), device) for device in ("auto", "cuda", "cpu")] == [0, 1, 0]
    assert gpus_of(BaseSize(None, None, "nothing"), "auto") == 1
    assert limits(spec(), large, {"gpus": "auto"})["gpus"] == 1
    assert limits(spec(), large, {"gpus": 0})["gpus"] == 0


@pytest.mark.parametrize("family", ["reparameterization", "selective", "post-hoc"])
def test_a_large_base_has_room_for_its_weights(family):
    found = limits(spec(family), size(SEVEN))
    weights = 6_738_415_616 * 4 / 1e6
    assert found["memory_mb"] > 1.4 * weights
    assert limits(spec(family, precision="bf16"), size(SEVEN))["memory_mb"] > 0.7 * weights


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("length", [64, 256])
def test_a_large_cell_is_given_several_times_what_it_takes(precision, length):
    """Not more than ten times the forecast of an A100; enough for a V100 with longest examples."""
    large = spec(precision=precision, steps=2000, max_length=length) | {"limits": {"gpus": 1}}
    large["target"] = "scan"
    large["tasks"] = {"scan": large["tasks"]["lm_dialect"] | {"max_length": length}}
    given = 60 * limits(large, size(SEVEN))["minutes"]

    def seconds(name: str, longest: bool) -> float:
        machine = Machine(1, 1, 1e6, None, name, 1e9)
        return cell_need(large, network(SEVEN), TASKS, machine, longest=longest).total

    assert (4 if precision == "fp32" else 6) < given / seconds("A100", False) < 10
    assert given >= seconds("V100", True)
    assert given >= 3.5 * seconds("V100", False)


def test_a_base_is_made_ready_in_the_precisions_of_its_cells():
    def found(*precisions: str) -> dict:
        trainings = [TRAINING | {"precision": precision} for precision in precisions]
        return base_limits({"path": "x"}, spec()["tasks"], trainings, 128, size(SEVEN), TASKS, {})

    full, half, both = found("fp32"), found("bf16"), found("fp32", "bf16")
    weights = 6_738_415_616 * 2 / 1e6
    assert 0.6 * full["memory_mb"] > half["memory_mb"] > weights
    assert both["memory_mb"] == full["memory_mb"]
    assert both["minutes"] >= max(full["minutes"], half["minutes"])


def test_more_work_is_given_more_time():
    def minutes(family="reparameterization", of=SEVEN, **training):
        return limits(spec(family, **training), size(of))["minutes"]

    assert minutes(steps=4000) > 8 * minutes(steps=200)
    assert minutes(batch_size=64) > minutes() > minutes("post-hoc")
    assert minutes() > minutes(of=None)


def test_limits_say_nothing_new_about_results():
    """No key of a cell, or of one of `tune`, hears of limits."""
    tables = []
    for limits in ({}, {"minutes": 3, "memory_mb": 100, "gpus": 4}):
        config = read_config(REPOSITORY / "config/config.yaml") | {"limits": limits}
        config["bases"]["micro-lm"]["limits"] = limits
        suite = load_suite(config, LAYOUT)
        made = make_plan(suite)
        tables.append((made.drop(columns="spec"), make_tune_plan(suite, made).drop(columns="spec")))
    for first, second in zip(*tables, strict=True):
        assert first.equals(second)


def test_a_retry_doubles_time_and_memory_and_no_gpu():
    assert limits_at({"minutes": 1.5, "memory_mb": 100, "gpus": 1}, 3) == (6, 400)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"gpus": -1}, "limits.gpus: -1 is less than the minimum of 0"),
        ({"gpus": "all"}, "limits.gpus: 'all'; allowed: `auto`, or a number"),
        ({"minutes": 0}, "limits.minutes: 0 is less than or equal to the minimum of 0"),
        ({"minutes": "10"}, "limits.minutes: '10' is not of type 'number' (no quotes)"),
        ({"memory": 4000}, "limits: unknown key 'memory'; did you mean 'memory_mb'?"),
    ],
)
@pytest.mark.parametrize("own", [False, True])
def test_bad_limits_are_refused_in_one_sentence(limits, said, own):
    where = {"base": {"limits": limits}} if own else {"limits": limits}
    with pytest.raises(SuiteError) as caught:
        plan(**where)
    message = str(caught.value)
    assert message.removeprefix("bases.micro-lm.").startswith(said), message
    assert "\n" not in message


def test_a_base_that_cannot_be_reached_is_guessed_by_its_name(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, parameters in {
        "me/Llama-2-7b-hf": 7e9, "me/Qwen2-0.5B": 5e8, "me/stories15M": 15e6, "me/gpt2": None,
    }.items():  # fmt: skip
        found = base_size({"hub": name})
        assert found.network is None
        assert found.parameters == parameters, name
        assert f"{name}: its size is not known" in found.problem
        assert "`path:`" in found.problem
    assert math.isfinite(limits(spec(), base_size({"hub": "me/gpt2"}))["minutes"])
