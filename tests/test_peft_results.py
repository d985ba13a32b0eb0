"""PEFT's result JSON: what is written there its own reader takes, what is read is checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ballast.errors import DataError
from ballast.exchange.peft_results import ballast_peft_table, export_peft, import_peft, read_peft
from ballast.files import write_json
from ballast.published import COLUMNS, check_published, protocols
from fake_records import failed, record


def result(**peft_config: Any) -> dict[str, Any]:
    """A result in the format of PEFT's MetaMathQA benchmark, made up."""
    return {
        "run_info": {
            "created_at": "2026-07-15T05:41:18+00:00",
            "total_time": 1153.3,
            "experiment_name": "lora/llama-3.2-3B-rank32",
            "peft_branch": "main",
            "train_config": {
                "model_id": "meta-llama/Llama-3.2-3B", "max_steps": 5000, "batch_size": 4,
                "optimizer_type": "AdamW", "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
            },
            "peft_config": {"peft_type": "LORA", "r": 32, "init_lora_weights": True} | peft_config,
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": 14 * 2**30,
            "accelerator_memory_max": 21 * 2**30,
            "accelerator_memory_reserved_99th": 19 * 2**30,
            "train_time": 942.0, "file_size": 35 * 2**20, "num_trainable_params": 9175040,
            "num_total_params": 3221924864, "status": "success",
            "metrics": [
                {"step": 250, "train loss": 0.9, "train time": 300.5, "valid accuracy": 0.3},
                {"step": 5000, "train loss": 0.6, "train time": 284.5, "valid accuracy": 0.5},
                {
                    "step": 5000, "test accuracy": 631 / 1319, "train loss": 0.607,
                    "train samples": 20000, "train total tokens": 4198051, "forgetting": 0.05,
                },
            ],
        },
        "meta_info": {
            "model_info": {"sha": "x", "created_at": "y"},
            "dataset_info": {"metamath": {"sha": "a"}, "gsm8k": {"sha": "b"}},
            "package_info": {
                f"{name}-version": "1"
                for name in ("peft", "transformers", "datasets", "torch", "bitsandbytes")
            },
            "system_info": {"system": "Linux"},
            "pytorch_info": "",
        },
    }  # fmt: skip


def at(data: Any, path: str) -> tuple[Any, str | int]:
    """The holder and the last key of a dotted path; numbers index lists."""
    *parents, last = [int(p) if p.lstrip("-").isdigit() else p for p in path.split(".")]
    for parent in parents:
        data = data[parent]
    return data, last


def what_peft_reads(data: dict[str, Any]) -> dict[str, Any]:
    """The fields that PEFT's processing.py takes of a result, cast as it casts them.

    Which keys those are was read in huggingface/peft at 5d602fdb, method_comparison.
    """
    run, train, meta = data["run_info"], data["train_info"], data["meta_info"]
    assert train["status"] == "success"
    last = train["metrics"][-1]
    whole = {
        key: int(train[key])
        for key in ("accelerator_memory_reserved_avg", "accelerator_memory_max",
                    "accelerator_memory_reserved_99th", "file_size", "num_trainable_params")
    }  # fmt: skip
    return whole | {
        "peft_type": run["peft_config"]["peft_type"] if run["peft_config"] else "full-finetuning",
        "experiment_name": run["experiment_name"],
        "model_id": run["train_config"]["model_id"],
        "configs": json.dumps([run["train_config"], run["peft_config"]]),
        "total_time": float(run["total_time"]),
        "train_time": float(train["train_time"]),
        "train_loss": float(last["train loss"]),
        "train_samples": int(last["train samples"]),
        "train_total_tokens": int(last["train total tokens"]),
        "test_accuracy": float(last["test accuracy"]),
        "forgetting": float(last.get("forgetting", 123)),
        "versions": [
            meta["package_info"][f"{name}-version"]
            for name in ("peft", "transformers", "datasets", "torch", "bitsandbytes")
        ],
        "system": json.dumps(meta["system_info"]),
        "branch": run["peft_branch"],
        "created_at": pd.to_datetime(run["created_at"]),
    }


def ours(**change: Any) -> dict[str, Any]:
    found = record("lora", 1, 8, e=43.5, f=-4.0)
    found["settings"]["training"] = {"batch_size": 8, "accumulation": 2, "precision": "fp32"}
    found["settings"]["hyper"] = {}
    return found | change


# Export.


def test_export_is_what_peft_reads() -> None:
    found = what_peft_reads(export_peft(ours(), created="2026-01-02T03:04:05+00:00"))
    assert found["test_accuracy"] == pytest.approx(0.535)
    assert found["forgetting"] == pytest.approx(1.54 - 1.5)  # of the text, not of the answers
    assert found["accelerator_memory_max"] == 600_000_000
    assert found["num_trainable_params"] == 8000
    assert (found["train_samples"], found["train_total_tokens"]) == (160, 5000)
    assert (found["train_loss"], found["train_time"]) == (0.5, 1.5)
    assert found["peft_type"] == "LORA"
    assert found["created_at"].year == 2026
    assert found["experiment_name"] == "lora/micro-lm-codes-rank8-seed1"
    json.dumps(export_peft(ours()), allow_nan=False)


def test_export_without_text_takes_the_answers() -> None:
    found = ours()
    del found["tasks"]["tales"]
    data = export_peft(found)
    last = data["train_info"]["metrics"][-1]
    assert last["forgetting"] == pytest.approx(0.5)
    assert data["run_info"]["ballast"]["forgetting"].endswith("facts, sums")
    for block in ("scores", "base_scores"):
        for name in found[block]:
            found[block][name]["loss"] = None
    assert "forgetting" not in export_peft(found)["train_info"]["metrics"][-1]


@pytest.mark.parametrize(
    ("method", "hyper", "rank", "wanted"),
    [
        ("full_st", {}, None, None),
        ("dora", {}, 4, {"peft_type": "LORA", "r": 4, "lora_alpha": 8.0, "use_dora": True}),
        ("vera", {"d_initial": 0.1}, 64, {"peft_type": "VERA", "r": 64, "d_initial": 0.1}),
        ("bat", {}, 16, {"peft_type": "MISS", "r": 16, "init_weights": "bat"}),
        ("milora", {"a": 1}, 8, {"peft_type": "MILORA", "r": 8, "a": 1}),
        (
            "peft_bridge", {"config": {"adapter_config": {"peft_type": "OSF"}}}, None,
            {"peft_type": "OSF"},
        ),
    ],
)  # fmt: skip
def test_export_names_the_method(
    method: str, hyper: dict[str, Any], rank: int | None, wanted: dict[str, Any] | None
) -> None:
    found = record(method, 0, rank)
    found["settings"]["hyper"] = hyper
    data = export_peft(found)
    assert data["run_info"]["peft_config"] == wanted
    if method not in ("milora",):
        assert import_peft(data)["method"].iloc[0] == method


def test_export_has_the_curve() -> None:
    steps = range(1, 601)
    curve = pd.DataFrame({"step": steps, "loss": [1000.0 / s for s in steps]})
    metrics = export_peft(ours(), curve)["train_info"]["metrics"]
    assert [entry["step"] for entry in metrics] == [250, 500, 10]
    assert metrics[1]["train loss"] == pytest.approx(curve["loss"][250:500].mean())
    assert metrics[1]["train samples"] == 500 * 16


def test_a_failed_record_has_no_numbers() -> None:
    data = export_peft(failed(ours()))
    assert data["train_info"]["status"] == "failed"
    assert data["train_info"]["metrics"] == []
    assert data["run_info"]["error_msg"] == "loss is NaN"
    assert data["run_info"]["ballast"]["measures"] == {}
    with pytest.raises(DataError, match="status"):
        import_peft(data)


def test_a_target_without_points_cannot_be_exported() -> None:
    found = ours()
    found["tasks"]["codes"]["unit"] = "nats"
    with pytest.raises(DataError, match="target in points"):
        export_peft(found)


# Import.


def test_import_is_the_published_row() -> None:
    rows = import_peft(result())
    assert list(rows.columns) == list(COLUMNS)
    check_published(rows, protocols())
    values = rows.set_index("task")["value"]
    assert values["GSM8K"] == pytest.approx(100 * 631 / 1319)
    assert values["finewiki"] == 0.05
    assert values["steps"] == 585.0
    assert (values["peak memory"], values["file"]) == (21.0, 35.0)
    first = rows.iloc[0]
    assert (first["protocol"], first["method"], first["rank"]) == ("peft_metamathqa", "lora", 32)
    assert (first["model"], first["learning_rate"]) == ("Llama-3.2-3B", 1e-4)
    assert first["spread"] == pytest.approx(1.375, abs=0.001)
    assert (rows["parameters"] == 9175040).all()


def test_another_setting_is_not_the_protocol() -> None:
    data = result()
    data["run_info"]["train_config"]["max_steps"] = 4000
    assert (import_peft(data)["protocol"] == "").all()


def test_ours_comes_back() -> None:
    rows = import_peft(export_peft(ours())).set_index("task")
    assert rows.loc["codes", "value"] == pytest.approx(53.5)
    assert rows.loc["codes", "target"] == "codes"
    assert rows.loc["upstream", "value"] == pytest.approx(0.04)
    assert (rows["protocol"] == "").all()
    assert (rows["rank"] == 8).all()


@pytest.mark.parametrize(
    ("config", "optimizer", "wanted"),
    [
        ({}, "AdamW", ("lora", "")),
        ({}, "lora-fa", ("lora_fa", "projected")),
        ({}, "lora+", ("lora_plus", "")),
        ({"use_dora": True}, "AdamW", ("dora", "")),
        ({"use_rslora": True}, "AdamW", ("rslora", "")),
        ({"init_lora_weights": "pissa_niter_16"}, "AdamW", ("pissa", "")),
        ({"init_lora_weights": "mica"}, "AdamW", ("peft_bridge", "mica")),
        ({"init_lora_weights": "eva"}, "AdamW", ("", "")),
        ({"use_bdlora": {"a": 1}}, "AdamW", ("", "")),
        ({"peft_type": "MISS", "init_weights": True}, "AdamW", ("bone", "strided")),
        ({"peft_type": "MISS", "init_weights": "mini"}, "AdamW", ("disha", "")),
        ({"peft_type": "MISS", "init_weights": "bat"}, "AdamW", ("bat", "")),
        ({"peft_type": "P_TUNING", "r": None}, "AdamW", ("p_tuning", "")),
        ({"peft_type": "BOFT", "r": 0}, "AdamW", ("peft_bridge", "boft")),
        ({"peft_type": "LILY"}, "AdamW", ("", "")),
    ],
)
def test_methods_of_peft(config: dict[str, Any], optimizer: str, wanted: tuple[str, str]) -> None:
    data = result(**config)
    data["run_info"]["train_config"]["optimizer_type"] = optimizer
    first = import_peft(data).iloc[0]
    assert (first["method"], first["variant"]) == wanted


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("run_info", None),
        ("run_info", []),
        ("run_info.total_time", "long"),
        ("run_info.total_time", float("nan")),
        ("run_info.total_time", -1.0),
        ("run_info.experiment_name", 5),
        ("run_info.train_config.model_id", None),
        ("run_info.peft_config", "LORA"),
        ("run_info.peft_config.peft_type", None),
        ("run_info.train_config.optimizer_kwargs.lr", "1e-4"),
        ("train_info.status", "done"),
        ("train_info.status", "canceled"),
        ("train_info.file_size", 3.5),
        ("train_info.file_size", True),
        ("train_info.accelerator_memory_max", None),
        ("train_info.num_trainable_params", -1),
        ("train_info.metrics", []),
        ("train_info.metrics", {"a": 1}),
        ("train_info.metrics.0", "step"),
        ("train_info.metrics.0.train time", float("inf")),
        ("train_info.metrics.-1.test accuracy", 47.8),
        ("train_info.metrics.-1.test accuracy", float("nan")),
        ("train_info.metrics.-1.train samples", 1.5),
        ("train_info.metrics.-1.train loss", None),
        ("train_info.metrics.-1.forgetting", 123),
        ("train_info.metrics.-1.forgetting", 123.0),
        ("train_info.metrics.-1.forgetting", float("nan")),
        ("train_info.metrics.-1.forgetting", "0.05"),
        ("meta_info.package_info", None),
    ],
)
def test_what_cannot_be_trusted_is_refused_by_its_key(path: str, value: Any) -> None:
    data = result()
    holder, last = at(data, path)
    holder[last] = value
    with pytest.raises(DataError) as caught:
        import_peft(data, "a.json")
    text = str(caught.value)
    assert text.startswith("a.json: ")
    assert "\n" not in text
    assert len(text) <= 300
    assert str(last).removeprefix("-1") in text


@pytest.mark.parametrize(
    "path",
    [
        "run_info", "run_info.created_at", "run_info.peft_config", "run_info.peft_branch",
        "train_info.status", "train_info.train_time", "train_info.metrics",
        "train_info.accelerator_memory_reserved_avg", "meta_info.system_info",
        "meta_info.package_info.torch-version", "meta_info.package_info.bitsandbytes-version",
        "train_info.metrics.-1.train total tokens", "train_info.metrics.-1.train samples",
    ],
)  # fmt: skip
def test_missing_keys_are_named(path: str) -> None:
    data = result()
    holder, last = at(data, path)
    del holder[last]
    with pytest.raises(DataError, match=str(last)):
        import_peft(data)


def test_a_missing_forgetting_is_only_missing() -> None:
    data = result()
    del data["train_info"]["metrics"][-1]["forgetting"]
    assert "finewiki" not in set(import_peft(data)["task"])
    assert "GSM8K" in set(import_peft(data)["task"])


def test_image_results_are_known() -> None:
    data = result()
    data["train_info"]["metrics"][-1] = {
        "test dino_similarity": 0.7, "drift": 0.25, "train loss": 0.1, "train samples": 1500
    }  # fmt: skip
    with pytest.raises(DataError, match="diffusers"):
        import_peft(data)
    data["meta_info"]["package_info"]["diffusers-version"] = "1"
    values = import_peft(data).set_index("task")["value"]
    assert (values["DINOv2 similarity"], values["drift on unrelated prompts"]) == (0.7, 0.25)


def test_hostile_text_is_one_line() -> None:
    data = result()
    data["run_info"]["experiment_name"] = "<script>\nlora\x00|=1+1"
    assert import_peft(data)["label"].iloc[0] == "<script> lora |=1+1"
    data["train_info"]["status"] = "bad\n\x1b[31m" + "x" * 1000
    with pytest.raises(DataError) as caught:
        import_peft(data)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) <= 300


def test_a_folder(tmp_path: Path) -> None:
    good, bad = result(), result()
    bad["train_info"]["status"] = "failed"
    write_json(tmp_path / "b.json", good)
    write_json(tmp_path / "a.json", bad)
    (tmp_path / "c.json").write_text("{")
    (tmp_path / "d.json").write_text("[" * 100_000)
    rows, problems = ballast_peft_table(tmp_path)
    assert len(rows) == len(read_peft(tmp_path / "b.json"))
    assert [line.split(":")[0].split("/")[-1] for line in problems] == [
        "a.json", "c.json", "d.json"
    ]  # fmt: skip
    rows, problems = ballast_peft_table(tmp_path / "none")
    assert (len(rows), problems) == (0, [])
    with pytest.raises(DataError, match="cannot be read"):
        read_peft(tmp_path / "none.json")


def test_import_leaves_the_data_alone() -> None:
    data = result()
    before = json.dumps(data)
    import_peft(data)
    assert json.dumps(data) == before
