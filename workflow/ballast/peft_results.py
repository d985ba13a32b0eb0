"""Results in the format of PEFT's own benchmark (`method_comparison/*/results/*.json`).

    export_peft(record, curve=None, created=None) -> dict   a record, ok or failed, as PEFT's JSON
    import_peft(data, name="") -> DataFrame       a PEFT result as rows of the published schema
    read_peft(path) -> DataFrame                  the same from a file
    ballast_peft_table(folder) -> (DataFrame, problems)     every *.json of a folder

`import_peft` and `read_peft` refuse with DataError, one line that names the key. The columns of the
rows are `ballast.published.COLUMNS`. Format: huggingface/peft at 5d602fdb (2026-08-21),
method_comparison/processing.py and MetaMathQA/utils.py.

PEFT's JSON knows no base score, so a result of PEFT's is a published row and never a record.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from ballast import tradeoff
from ballast.declare import MethodFile, discover
from ballast.errors import DataError
from ballast.escape import one_line
from ballast.layout import Layout
from ballast.peft_checks import check_peft
from ballast.published.data import COLUMNS, typed
from ballast.twins import TWINS

MIB, GIB = 2**20, 2**30
GSM8K = 1319  # items of its test set, all of which PEFT's benchmark scores
EVERY = 250  # steps between two entries of `metrics`
TYPES = {
    "LoraConfig": "LORA", "AdaLoraConfig": "ADALORA", "VeraConfig": "VERA", "MissConfig": "MISS",
    "FourierFTConfig": "FOURIERFT", "IA3Config": "IA3", "PromptTuningConfig": "PROMPT_TUNING",
    "PrefixTuningConfig": "PREFIX_TUNING", "PromptEncoderConfig": "P_TUNING",
}  # fmt: skip
BRIDGED = ("BOFT", "LOHA", "SHIRA", "OSF")  # variants of `peft_bridge`, by their type


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


def import_peft(data: Any, name: str = "") -> pd.DataFrame:
    """A PEFT result as rows of the published schema: target, forgetting or drift, and costs.

    name: what the error calls the file. Raises DataError with one line that names the key, if
    something is missing, of the wrong type, not finite, out of its range, a sentinel (123 stands
    for a missing forgetting in PEFT's tables), or if the run did not succeed.
    """
    kind = check_peft(data, name)
    run, train = data["run_info"], data["train_info"]
    method, variant = _method(run)
    names = _names(data["meta_info"].get("dataset_info"), kind)
    common = dict.fromkeys(COLUMNS, "") | {
        "source": "peft_import",
        "paper": "PEFT result JSON",
        "protocol": _protocol(run["train_config"], kind),
        "model": one_line(run["train_config"]["model_id"]).split("/")[-1],
        "target": names[0],
        "method": method,
        "variant": variant,
        "label": one_line(run["experiment_name"]),
        "rank": _rank(run["peft_config"] or {}),
        "tuned": "yes",
        "n_seeds": 1,
        "learning_rate": (run["train_config"].get("optimizer_kwargs") or {}).get("lr") or "",
        "parameters": train["num_trainable_params"],
        "evidence": "C",
    }
    rows = [
        common | one for one in (*_scores(train["metrics"][-1], kind, names), *_costs(run, train))
    ]
    return typed(pd.DataFrame(rows, columns=list(COLUMNS)), name or "PEFT result")


def _names(datasets: Any, kind: str) -> tuple[str, str, str]:
    """What was trained on, the target's task and the upstream one.

    A result in the same format of other data (one of Ballast's, say) is named by its first data.
    """
    if kind == "image":
        return "DreamBooth cat plushy", "DINOv2 similarity", "drift on unrelated prompts"
    found = list(datasets) if isinstance(datasets, Mapping) else []
    if not found or "gsm8k" in found:
        return "MetaMathQA", "GSM8K", "finewiki"
    return one_line(found[0]), one_line(found[0]), "upstream"


def _scores(
    last: Mapping[str, Any], kind: str, names: tuple[str, str, str]
) -> list[dict[str, Any]]:
    _, task, upstream = names
    if kind == "metamathqa":
        share = last["test accuracy"]
        found = [_row(task, "target", "accuracy", "points", 100 * share, "higher")]
        if task == "GSM8K":
            found[0] |= {"spread": 100 * (share * (1 - share) / GSM8K) ** 0.5}
        other = ("forgetting", upstream, "delta_ce", "nats")
    else:
        share = last["test dino_similarity"]
        found = [_row(task, "target", "similarity", "cosine", share, "higher")]
        other = ("drift", upstream, "drift", "(1-cos)/2")
    if last.get(other[0]) is not None:
        found.append(_row(other[1], "upstream", other[2], other[3], last[other[0]], "lower"))
    return [*found, _row("train loss", "other", "train_loss", "nats", last["train loss"], "lower")]


def _row(task: str, role: str, metric: str, unit: str, value: float, better: str) -> dict[str, Any]:
    return {
        "task": task, "role": role, "metric": metric, "unit": unit, "value": value, "better": better
    }  # fmt: skip


def _costs(run: Mapping[str, Any], train: Mapping[str, Any]) -> list[dict[str, Any]]:
    steps = [entry["train time"] for entry in train["metrics"] if "train time" in entry]
    found = [("steps", "seconds", "s", sum(steps))] if steps else []
    found += [
        ("train_time", "seconds", "s", train["train_time"]),
        ("total", "seconds", "s", run["total_time"]),
        ("peak memory", "memory", "GiB", train["accelerator_memory_max"] / GIB),
        ("mean memory", "memory", "GiB", train["accelerator_memory_reserved_avg"] / GIB),
        ("file", "size", "MiB", train["file_size"] / MIB),
    ]
    return [_row(task, "cost", metric, unit, value, "lower") for task, metric, unit, value in found]


def _protocol(config: Mapping[str, Any], kind: str) -> str:
    """The published protocol, if the run's settings are its settings; else none."""
    wanted = {
        "metamathqa": ("meta-llama/Llama-3.2-3B", 5000, 4),
        "image": ("black-forest-labs/FLUX.2-klein-base-4B", 750, 2),
    }[kind]
    same = (config["model_id"], config.get("max_steps"), config.get("batch_size")) == wanted
    return {"metamathqa": "peft_metamathqa", "image": "peft_image"}[kind] if same else ""


def _method(run: Mapping[str, Any]) -> tuple[str, str]:
    """Ballast's method and variant for a configuration of PEFT's; empty where there is none."""
    config = run["peft_config"]
    if not config:
        return "full_st", ""
    kind = config["peft_type"].upper()
    if kind == "LORA":
        return _lora(config, str(run["train_config"].get("optimizer_type", "")).lower())
    if kind == "MISS":
        start = str(config.get("init_weights", True)).lower()
        return {"bat": ("bat", ""), "mini": ("disha", "")}.get(start, ("bone", "strided"))
    if kind in BRIDGED or kind == "OFT":
        return "peft_bridge", "" if kind == "OFT" else kind.lower()
    names = {TYPES[twin.config]: name for name, twin in reversed(TWINS.items())}
    return names.get(kind, ""), ""


def _lora(config: Mapping[str, Any], optimizer: str) -> tuple[str, str]:
    start = str(config.get("init_lora_weights", True)).lower()
    special = ("use_bdlora", "use_qalora", "velora_config", "monteclora_config", "arrow_config")
    if any(config.get(key) for key in special):
        return "", ""
    if config.get("use_dora"):
        return "dora", ""
    if config.get("use_rslora"):
        return "rslora", ""
    if start == "mica":
        return "peft_bridge", "mica"
    for name in ("pissa", "olora", "corda"):
        if start.startswith(name):
            return name, ""
    if start not in ("true", "gaussian", "kaiming"):
        return "", ""
    return {"lora-fa": ("lora_fa", "projected"), "lora+": ("lora_plus", "")}.get(
        optimizer, ("lora", "")
    )


def _rank(config: Mapping[str, Any]) -> int | str:
    kind = str(config.get("peft_type", "")).upper()
    key = {"ADALORA": "target_r", "OSF": "effective_rank"}.get(kind, "r")
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else ""


def read_peft(path: Path) -> pd.DataFrame:
    """`import_peft` of a file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(one_line(f"{path}: damaged, not JSON: {error}")) from None
    return import_peft(data, path.name)


def ballast_peft_table(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows of every *.json of a folder, by file name, and a line for each that was refused."""
    frames, problems = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            frames.append(read_peft(path))
        except DataError as error:
            problems.append(str(error))
    empty = typed(pd.DataFrame(columns=list(COLUMNS), dtype=str), str(folder))
    return pd.concat(frames, ignore_index=True) if frames else empty, problems
