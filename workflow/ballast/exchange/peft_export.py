"""A record in the format of PEFT's own benchmark; see `ballast.exchange.peft_results`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from statistics import fmean
from typing import Any

import pandas as pd

from ballast import tradeoff
from ballast.declare import MethodFile, discover
from ballast.errors import DataError
from ballast.escape import one_line
from ballast.layout import Layout
from ballast.twins import TWINS

EVERY = 250  # steps between two entries of `metrics`
TYPES = {
    "LoraConfig": "LORA", "AdaLoraConfig": "ADALORA", "VeraConfig": "VERA", "MissConfig": "MISS",
    "FourierFTConfig": "FOURIERFT", "IA3Config": "IA3", "PromptTuningConfig": "PROMPT_TUNING",
    "PrefixTuningConfig": "PREFIX_TUNING", "PromptEncoderConfig": "P_TUNING",
}  # fmt: skip


def export_peft(
    record: Mapping[str, Any], curve: pd.DataFrame | None = None, created: str | None = None
) -> dict[str, Any]:
    """A record as PEFT's benchmark would have written it, ready for `files.write_json`.

    curve: the cell's training curve (columns step and loss), for the entries every `EVERY` steps.
    created: when the cell ran, ISO 8601; records do not say it, and PEFT's reader needs a date, so
    it is 1970 where missing.
    "test accuracy" is the target's mean score as a share; "forgetting" the mean change of the loss
    in nats per token, over the upstream tasks of plain text if there are any, else over all;
    left out where no loss is known. A method without a counterpart in PEFT has its own name, in
    capitals, as `peft_type`. What PEFT has no place for stands under `run_info.ballast`.
    """
    identity, costs = record["identity"], record["costs"]
    seconds, packages = costs.get("seconds") or {}, record["provenance"].get("packages") or {}
    ok = record["status"] == "ok"
    peak, training = _memory(costs)
    name = _experiment(record)
    return {
        "run_info": {
            "created_at": created or datetime.fromtimestamp(0, UTC).isoformat(),
            "total_time": _number(seconds.get("total")),
            "experiment_name": name,
            "peft_branch": "ballast",
            "train_config": _train_config(record),
            "peft_config": _peft_config(record),
            "error_msg": "" if ok else record["failure"]["reason"],
            "ballast": {
                "cell": record["id"],
                "suite": identity["suite"],
                "target": identity["target"],
                "family": record["method"]["family"],
                "measures": tradeoff.of_record(record) if ok else {},
                "memory": "high-water marks by phase; the mean and the 99th percentile are not "
                "measured and hold the mark of training, which bounds them from above",
                "forgetting": _forgetting_of(record)[1] if ok else "",
            },
        },
        "train_info": {
            "accelerator_memory_reserved_avg": training,
            "accelerator_memory_max": peak,
            "accelerator_memory_reserved_99th": training,
            "train_time": _number(seconds.get("train")),
            "file_size": int(costs.get("adapter_bytes") or 0),
            "num_trainable_params": int(costs.get("trainable_parameters") or 0),
            "num_total_params": int(costs.get("total_parameters") or 0),
            "status": "success" if ok else "failed",
            "metrics": [*_during(record, curve), _last(record)] if ok else [],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {identity["target"]: {"sha": None, "created_at": None}},
            "package_info": _packages(packages),
            "system_info": _system(record["provenance"]),
            "pytorch_info": "",
        },
    }


def _number(value: Any) -> float:
    return float(value or 0.0)


def _experiment(record: Mapping[str, Any]) -> str:
    identity = record["identity"]
    parts = [identity["base"], identity["target"]]
    parts += [f"rank{identity['rank']}"] if identity["rank"] else []
    parts += [identity["variant"]] if identity["variant"] else []
    return one_line(f"{identity['method']}/{'-'.join([*parts, 'seed' + str(identity['seed'])])}")


def _memory(costs: Mapping[str, Any]) -> tuple[int, int]:
    """High-water marks in bytes: of the whole cell, and of training."""
    marks = costs.get("memory_mb") or {}
    values = {name: int(_number(value) * 1e6) for name, value in marks.items()}
    return max(values.values(), default=0), values.get("train", 0)


def _train_config(record: Mapping[str, Any]) -> dict[str, Any]:
    identity, settings = record["identity"], record["settings"]
    training = settings["training"] or {}
    precision = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    return {
        "model_id": identity["base"],
        "dtype": precision.get(training.get("precision"), training.get("precision")),
        "max_seq_length": training.get("max_length"),
        "batch_size": training.get("batch_size"),
        "batch_size_eval": settings["evaluation"].get("batch_size"),
        "max_steps": training.get("steps"),
        "eval_steps": EVERY,
        "use_gc": training.get("gradient_checkpointing"),
        "seed": identity["seed"],
        "grad_norm_clip": training.get("clip"),
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {
            "lr": settings["learning_rate"],
            "weight_decay": training.get("weight_decay"),
        },
        "lr_scheduler": training.get("schedule"),
    }


def _peft_config(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """PEFT's configuration of the method as it ran; None for a method that tunes in full."""
    identity, hyper = record["identity"], record["settings"]["hyper"]
    method, rank = identity["method"], identity["rank"]
    if method == "full_st":
        return None
    if method == "peft_bridge":
        return {"peft_type": "UNKNOWN"} | (hyper.get("config") or {}).get("adapter_config", {})
    twin = TWINS.get(method)
    if twin is None:
        return {"peft_type": method.upper(), "r": rank} | hyper
    settings = _methods()[method].hyper(**hyper)
    return {"peft_type": TYPES[twin.config]} | twin.options(rank, settings)


@cache
def _methods() -> dict[str, MethodFile]:
    return discover(Layout.here().methods)


def _during(record: Mapping[str, Any], curve: pd.DataFrame | None) -> list[dict[str, Any]]:
    if curve is None or not len(curve):
        return []
    per_step = _per_step(record)
    found = []
    for at in range(EVERY, int(curve["step"].max()) + 1, EVERY):
        part = curve[(curve["step"] > at - EVERY) & (curve["step"] <= at)]
        mean = float(part["loss"].mean())
        found.append({"step": at, "train loss": mean, "train samples": at * per_step})
    return found


def _per_step(record: Mapping[str, Any]) -> int:
    training = record["settings"]["training"] or {}
    return int(training.get("batch_size") or 0) * int(training.get("accumulation") or 1)


def _last(record: Mapping[str, Any]) -> dict[str, Any]:
    curve = record["curve"] or {"steps": 0, "last_loss": None}
    target = tradeoff.target_mean(tradeoff.points_of(record, "scores", "target"))
    if target is None:
        raise DataError(f"{record['id']}: no score of the target in points; PEFT's format needs it")
    found = {
        "step": int(curve["steps"]),
        "test accuracy": target / 100,
        "train loss": _number(curve["last_loss"]),
        "train samples": int(curve["steps"]) * _per_step(record),
        "train total tokens": int(record["costs"].get("tokens") or 0),
    }
    forgetting, _ = _forgetting_of(record)
    return found if forgetting is None else found | {"forgetting": forgetting}


def _forgetting_of(record: Mapping[str, Any]) -> tuple[float | None, str]:
    """Mean ΔCE and which tasks it is the mean of."""
    changes: dict[str, dict[str, float]] = {"text": {}, "all": {}}
    for name, task in record["tasks"].items():
        change = tradeoff.delta_ce(
            record["scores"][name]["loss"], record["base_scores"][name]["loss"]
        )
        if task["role"] == "upstream" and change is not None:
            changes["all"][name] = change
            if task["unit"] != "points":
                changes["text"][name] = change
    chosen = changes["text"] or changes["all"]
    if not chosen:
        return None, "no loss is known"
    return fmean(chosen.values()), f"mean change of the loss of {', '.join(sorted(chosen))}"


def _packages(packages: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch"):
        found |= {f"{name}-version": packages.get(name), f"{name}-commit-hash": None}
    return found


def _system(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "system": provenance.get("platform"),
        "processor": provenance.get("processor"),
        "accelerator": provenance.get("device"),
    }
