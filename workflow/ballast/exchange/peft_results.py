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
from pathlib import Path
from typing import Any

import pandas as pd

from ballast.errors import DataError
from ballast.escape import one_line
from ballast.exchange.peft_checks import check_peft
from ballast.exchange.peft_export import TYPES, export_peft
from ballast.published.data import COLUMNS, typed
from ballast.twins import TWINS

__all__ = ["ballast_peft_table", "export_peft", "import_peft", "read_peft"]
MIB, GIB = 2**20, 2**30
GSM8K = 1319  # items of its test set, all of which PEFT's benchmark scores
BRIDGED = ("BOFT", "LOHA", "SHIRA", "OSF")  # variants of `peft_bridge`, by their type


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
