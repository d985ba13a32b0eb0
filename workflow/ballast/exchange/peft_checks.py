"""What PEFT's result JSON must hold before a number of it is believed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ballast.errors import DataError
from ballast.escape import one_line, shorten

MISSING = 123  # PEFT's tables write it where no forgetting was measured
STATUSES = ("success", "failed", "canceled")
TEXT, COUNT, AMOUNT, MAPPING, LIST = "text", "a count", "an amount", "a mapping", "a list"
KEYS = (
    ("run_info", MAPPING),
    ("run_info.experiment_name", TEXT),
    ("run_info.created_at", TEXT),
    ("run_info.peft_branch", TEXT),
    ("run_info.total_time", AMOUNT),
    ("run_info.train_config", MAPPING),
    ("run_info.train_config.model_id", TEXT),
    ("train_info", MAPPING),
    ("train_info.status", TEXT),
    ("train_info.train_time", AMOUNT),
    ("train_info.accelerator_memory_reserved_avg", COUNT),
    ("train_info.accelerator_memory_max", COUNT),
    ("train_info.accelerator_memory_reserved_99th", COUNT),
    ("train_info.file_size", COUNT),
    ("train_info.num_trainable_params", COUNT),
    ("train_info.metrics", LIST),
    ("meta_info", MAPPING),
    ("meta_info.package_info", MAPPING),
    ("meta_info.system_info", MAPPING),
)
PACKAGES = ("peft", "transformers", "datasets", "torch")
LAST = {
    "metamathqa": (("test accuracy", AMOUNT), ("train total tokens", COUNT)),
    "image": (("test dino_similarity", AMOUNT),),
}
OTHER = {"metamathqa": "forgetting", "image": "drift"}
PACKAGE = {"metamathqa": "bitsandbytes", "image": "diffusers"}


def check_peft(data: Any, name: str = "") -> str:
    """Which of PEFT's tasks a result is of: metamathqa or image.

    Raises DataError with one line that names the key; `name` is what it calls the file.
    """
    try:
        return _check(data)
    except DataError as error:
        text = one_line(f"{name}: {error}" if name else str(error))
        raise DataError(shorten(text, 300)) from None


def _check(data: Any) -> str:
    if not isinstance(data, Mapping):
        raise DataError("the result: a mapping is expected")
    for key, kind in KEYS:
        _must_be(_at(data, key), kind, key)
    _check_config(data["run_info"])
    status = data["train_info"]["status"]
    if status not in STATUSES:
        raise DataError(f"train_info.status: {status!r}; allowed: {', '.join(STATUSES)}")
    if status != "success":
        raise DataError(f"train_info.status: {status!r}; only a run of status success has results")
    kind = _check_metrics(data["train_info"]["metrics"])
    packages = data["meta_info"]["package_info"]
    for package in (*PACKAGES, PACKAGE[kind]):
        if f"{package}-version" not in packages:
            raise DataError(f"meta_info.package_info.{package}-version: missing")
    return kind


def _check_config(run: Mapping[str, Any]) -> None:
    if "peft_config" not in run:
        raise DataError("run_info.peft_config: missing (null for full fine-tuning)")
    if run["peft_config"]:
        _must_be(run["peft_config"], MAPPING, "run_info.peft_config")
        kind = run["peft_config"].get("peft_type")
        _must_be(kind, TEXT, "run_info.peft_config.peft_type")
    options = run["train_config"].get("optimizer_kwargs")
    if options is not None:
        _must_be(options, MAPPING, "run_info.train_config.optimizer_kwargs")
        if options.get("lr") is not None:
            _must_be(options["lr"], AMOUNT, "run_info.train_config.optimizer_kwargs.lr")


def _check_metrics(metrics: list[Any]) -> str:
    if not metrics:
        raise DataError("train_info.metrics: empty")
    for at, entry in enumerate(metrics):
        _must_be(entry, MAPPING, f"train_info.metrics[{at}]")
        if "train time" in entry:
            _must_be(entry["train time"], AMOUNT, f"train_info.metrics[{at}].train time")
    last, where = metrics[-1], "train_info.metrics[-1]"
    kind = next((k for k, keys in LAST.items() if keys[0][0] in last), None)
    if kind is None:
        names = " or ".join(repr(keys[0][0]) for keys in LAST.values())
        raise DataError(f"{where}: neither {names}")
    for key, what in (*LAST[kind], ("train loss", AMOUNT), ("train samples", COUNT)):
        _must_be(last.get(key), what, f"{where}.{key}")
    score = LAST[kind][0][0]
    if not 0 <= last[score] <= 1:
        raise DataError(f"{where}.{score}: {last[score]} is not in 0 to 1")
    _check_other(last.get(OTHER[kind]), f"{where}.{OTHER[kind]}")
    return kind


def _check_other(value: Any, where: str) -> None:
    """Forgetting or drift: may be missing, may be negative, is never the sentinel."""
    if value is None:
        return
    if not _is_number(value) or not math.isfinite(value):
        raise DataError(f"{where}: {value!r} is not a finite number; leave the key out")
    if value == MISSING:
        raise DataError(f"{where}: {MISSING} stands for a missing value; leave the key out")


def _at(data: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key whose parents were checked before."""
    *parents, last = key.split(".")
    for parent in parents:
        data = data[parent]
    return data.get(last)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _must_be(value: Any, kind: str, where: str) -> None:
    if value is None:
        raise DataError(f"{where}: missing")
    good = {
        TEXT: lambda v: isinstance(v, str) and v != "",
        COUNT: lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0,
        AMOUNT: lambda v: _is_number(v) and math.isfinite(v) and v >= 0,
        MAPPING: lambda v: isinstance(v, Mapping),
        LIST: lambda v: isinstance(v, list),
    }[kind](value)
    if not good:
        raise DataError(f"{where}: {value!r}; {kind} is expected")
