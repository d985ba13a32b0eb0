"""Records as a run would write them, made up, for tests of tables and plots."""

from __future__ import annotations

import copy
import json
from typing import Any

import pandas as pd

TASKS: dict[str, dict[str, Any]] = {
    "facts": {"title": "Facts", "role": "upstream", "metric": "acc", "unit": "points"},
    "sums": {"title": "Sums", "role": "upstream", "metric": "em", "unit": "points"},
    "tales": {"title": "Tales", "role": "upstream", "metric": "ce", "unit": "nats"},
    "codes": {"title": "Codes", "role": "target", "metric": "em", "unit": "points"},
    "wiki": {"title": "Wiki", "role": "probe", "metric": "acc", "unit": "points"},
}
for _task in TASKS.values():
    _task |= {"direction": "higher" if _task["unit"] == "points" else "lower", "chance": None}
BASE = {"facts": 90.0, "sums": 80.0, "tales": 1.5, "codes": 10.0, "wiki": 40.0}


def score(value: float, loss: float | None, **extras: float) -> dict[str, Any]:
    return {"value": value, "n": 300, "loss": loss} | extras


def record(
    method: str = "lora", seed: int = 0, rank: int | None = 8, e: float = 50.0, f: float = -10.0,
    base: str = "micro-lm", target: str = "codes", variant: str = "", **method_facts: str,
) -> dict[str, Any]:  # fmt: skip
    """An ok record with Target 10 + e, upstream points 90 + f and 80 + f, and losses to match."""
    after = {k: v + (e if k == "codes" else f) for k, v in BASE.items()} | {"tales": 1.5 - f / 100}
    label = method + (f"-r{rank}" if rank else "") + (f"+{variant}" if variant else "")
    found = {
        "format": 1,
        "id": f"{base}.{target}.{label}.s{seed}-0123abcd",
        "status": "ok",
        "failure": None,
        "identity": {
            "suite": "tiny", "base": base, "target": target, "method": method,
            "variant": variant, "rank": rank, "seed": seed, "parents": [],
        },
        "method": {"title": method, "family": "reparameterization", "digest": "d"} | method_facts,
        "keys": {"train": "t1", "eval": "e1", "base": "b1", "data": "d1"},
        "settings": {
            "learning_rate": 2e-4, "learning_rate_source": "tuned", "hyper": {}, "training": {},
            "modules": "all", "connector": "frozen", "scale": 2.0, "evaluation": {},
        },
        "tasks": copy.deepcopy(TASKS),
        "scored": "merged",
        "scores": {k: score(v, 1.0 if k != "tales" else v) for k, v in after.items()},
        "base_scores": {k: score(v, 0.5 if k != "tales" else v) for k, v in BASE.items()},
        "costs": {
            "trainable_parameters": 1000 * (rank or 400), "total_parameters": 400000,
            "adapter_bytes": 4000,
            "seconds": dict.fromkeys(
                ("start", "load", "attach", "train", "merge", "evaluate", "total"), 1.5
            ),
            "first_step_seconds": 2.0, "step_ms": 30.0,
            "memory_mb": {"train": 600.0, "evaluate": 500.0}, "tokens": 5000,
        },
        "report": {}, "curve": {"steps": 10, "first_loss": 3.0, "last_loss": 0.5},
        "files": {"adapter.safetensors": "00"}, "provenance": {"packages": {}},
    }  # fmt: skip
    found["scores"]["tales"]["byte_perplexity"] = 2.5
    found["base_scores"]["tales"]["byte_perplexity"] = 2.25
    return found


def failed(found: dict[str, Any], kind: str = "diverged", reason: str = "loss is NaN") -> dict:
    """The record as a failed one, its scores still in it as a trap."""
    failure = {"kind": kind, "reason": reason, "attempts": 1}
    return found | {"status": "failed", "failure": failure}


def plan_of(records: list[dict[str, Any]]) -> pd.DataFrame:
    """A plan that has exactly the cells of these records."""
    rows = []
    for item in records:
        identity = item["identity"]
        spec = item["method"] | {"suite": "tiny", "hyper": {}, "connector": "frozen"}
        spec["parents"] = identity["parents"]
        spec |= {"learning_rate": 2e-4, "learning_rate_source": "tuned"}
        rows.append(
            {k: identity[k] for k in ("base", "target", "method", "variant", "rank", "seed")}
            | {"id": item["id"], "parents": "", "train_key": "t1", "eval_key": "e1"}
            | {"spec": json.dumps(spec)}
        )
    plan = pd.DataFrame(rows)
    plan["rank"] = plan["rank"].astype("Int64")
    return plan.set_index("id", drop=False)
