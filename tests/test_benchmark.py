"""What the benchmark measures, on shapes of milliseconds; the times themselves are not tested."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from ballast import cli
from ballast.benchmark import Settings, measure, time_by_phase, write_benchmark
from ballast.declare import discover
from ballast.errors import SuiteError
from ballast.measure import (
    Runner,
    Shape,
    inference,
    interleaved,
    median_interval,
    our_runner,
    peak_bytes,
    runners,
    saved_bytes,
)
from ballast.suite import load_suite
from ballast.twins import TWINS
from test_suite import GOOD, LAYOUT
from tiny import METHODS

FILES = discover(METHODS)
TINY = Shape(hidden=64, tokens=32, precision="fp32", rank=4, layers=1)
SMALL = {"hidden": 64, "tokens": 32, "rounds": 2, "rank": 4, "layers": 1, "generated": 2}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "bone", "ia3", "prefix_tuning"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_has_ours_and_pefts(name, precision):
    shape = Shape(hidden=64, tokens=32, precision=precision, rank=4, layers=1)
    row = measure(FILES[name], shape, rounds=2, generated=2, with_peft=True)
    assert (row["method"], row["hidden"], row["tokens"], row["dtype"]) == (name, 64, 32, precision)
    for key in ("ours_over_base", "peft_over_base", "ours_over_peft", "memory_over_base"):
        assert row[key] > 0, key
    assert row["ours_over_base_low"] <= row["ours_over_base"] <= row["ours_over_base_high"]
    for key in ("start_seconds", "token_over_base", "base_token_ms", "base_saved_mb"):
        assert row[key] > 0, key
    prefix = 2 * 10 * 64 * (4 if precision == "fp32" else 2)  # keys and values of 10 tokens
    expected = prefix if name == "prefix_tuning" else 0
    assert row["peft_cache_extra_bytes"] == expected
    assert row["cache_extra_bytes"] in (expected, 2 * expected)  # ours may be kept in fp32


@pytest.mark.parametrize("name", ["full_st", "lisa", "peft_bridge"])
def test_a_row_without_a_twin(name):
    """In bf16 too, where selective tuning raises what trains, so that nothing can generate."""
    shape = Shape(hidden=64, tokens=32, precision="bf16", rank=4, layers=2)
    row = measure(FILES[name], shape, rounds=2, generated=2, with_peft=True)
    assert row["ours_over_base"] > 0
    assert row["peft_over_base"] is None
    assert row["ours_over_peft"] is None
    assert (row["token_over_base"] is None) == (name != "peft_bridge")


@pytest.mark.parametrize("name", [n for n, twin in TWINS.items() if twin.step])
def test_every_twin_takes_a_step(name):
    found = runners(TINY, FILES[name], with_peft=True)
    assert set(found) == {"base", "ours", "peft"}
    for runner in found.values():
        runner.step()
    trained = [p for p in found["peft"].model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)


def test_memory_is_counted_exactly():
    """A product of two parameters keeps nothing of its own; tanh keeps its output."""
    weight = torch.nn.Linear(100, 50, bias=False)
    held = torch.randn(200, 100)

    def forward():
        return torch.tanh(weight(held)).sum()

    runner = Runner(weight, forward)
    inputs, output = 200 * 100 * 4, 200 * 50 * 4
    assert saved_bytes(runner) == inputs + output
    # A square keeps its factor for both sides: once.
    squared = Runner(weight, lambda: weight(held).exp().square().sum())
    assert saved_bytes(squared) == inputs + output
    twice = Runner(weight, lambda: (lambda h: h.exp() * h.exp())(weight(held)).sum())
    assert saved_bytes(twice) == inputs + 2 * output
    # The weight; in the step: the products in and after tanh, its gradient, and the weight's.
    found = peak_bytes(runner) - 4 * 5000
    assert 2 * output <= found <= 3 * output + 4 * 5000 + 4096
    assert found == peak_bytes(runner) - 4 * 5000


def test_what_an_adapter_keeps_is_its_low_rank_activations():
    """LoRA keeps x A^T of every linear, beside inputs that the base does not keep."""
    extra = []
    for rank in (4, 8):
        shape = Shape(hidden=64, tokens=32, rank=rank, layers=1)
        extra.append(saved_bytes(our_runner(shape, shape.model(), FILES["lora"])))
    assert extra[1] - extra[0] == 7 * 32 * 4 * 4  # 7 linears, 32 tokens, 4 ranks more, fp32


def test_steps_take_turns_in_going_first():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = interleaved(steps, 3)
    assert "".join(order) == "abcbcacab"
    assert all(len(found) == 3 for found in seconds.values())


def test_median_interval_holds_the_median():
    low, high = median_interval([5.0, 1.0, 3.0, 2.0, 4.0])[1:]
    assert median_interval([5.0, 1.0, 3.0, 2.0, 4.0])[0] == 3.0
    assert low <= 3.0 <= high


def test_inference_counts_the_cache():
    found = runners(TINY, FILES["lora"], with_peft=False)
    _, held = inference(found["base"], prompt=5, tokens=3)
    assert held == 2 * 7 * 64 * 4  # keys and values of 5 + 2 tokens; the last one is not run


def test_settings_of_a_suite(tmp_path):
    settings = Settings.of({"hidden": [64, 128], "tokens": 32, "precision": ["fp32", "bf16"]})
    shapes = [(s.hidden, s.tokens, s.precision) for s in settings.shapes()]
    assert shapes == [(h, 32, p) for h in (64, 128) for p in ("fp32", "bf16")]
    with pytest.raises(SuiteError, match=r"benchmark: unknown key 'hiden'.*hidden"):
        Settings.of({"hiden": [64]})
    with pytest.raises(SuiteError, match=r"benchmark\.precision: 'fp64'; allowed: fp32, bf16"):
        Settings.of({"precision": "fp64"})
    import yaml

    content = yaml.safe_load(GOOD) | {"benchmark": {"hidden": [64], "rounds": 3}}
    assert load_suite(content, LAYOUT, tmp_path).config["benchmark"]["rounds"] == 3
    content["benchmark"]["rounds"] = 0
    with pytest.raises(SuiteError, match=r"benchmark\.rounds"):
        load_suite(content, LAYOUT, tmp_path)


def test_tables_are_written_and_what_cannot_run_is_reported(tmp_path):
    lines = []
    settings = Settings.of(SMALL | {"methods": ["lora", "moe_lora", "wise_ft"]})
    steps = write_benchmark(FILES, [], tmp_path, settings, lines.append)
    assert list(steps["method"]) == ["lora"]  # rank 4 has no 8 experts; post-hoc does not train
    assert any(line.startswith("moe_lora, hidden 64, 32 tokens: left out: ") for line in lines)
    stored = pd.read_csv(tmp_path / "steps.csv")
    assert list(stored["method"]) == ["lora"]
    text = (tmp_path / "benchmark.md").read_text()
    assert "# Where the time goes" in text
    assert "| lora" in text
    assert (tmp_path / "phases.csv").exists()
    with pytest.raises(SuiteError, match=r"benchmark\.methods: unknown method 'loar'"):
        write_benchmark(FILES, [], tmp_path, Settings.of({"methods": ["loar"]}), lines.append)


def test_the_command(tmp_path, capsys):
    sizes = [word for key, value in SMALL.items() for word in (f"--{key}", str(value))]
    arguments = ["benchmark", str(tmp_path), *sizes, "--methods", "lora", "--threads", "1"]
    assert cli.main(arguments) == 0
    assert "lora, hidden 64, 32 tokens:" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "steps.csv")) == 1


def test_time_by_phase_sums_finished_cells():
    assert time_by_phase([]).empty
    cells = [
        {
            "status": status,
            "identity": {"base": "b", "method": "lora"},
            "costs": {"seconds": {"train": 2.0, "total": 3.0}, "first_step_seconds": 1.0},
        }
        for status in ("ok", "ok", "failed")
    ]
    (row,) = time_by_phase(cells).to_dict("records")
    assert (row["cells"], row["train"], row["total"]) == (2, 4.0, 6.0)
    assert row["seconds_to_first_step"] == 1.0
