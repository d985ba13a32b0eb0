"""`snakemake fetch`: downloads what comes from the hub, and makes nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from ballast import fetch as module
from ballast.layout import Layout
from ballast.suite import TRAINING


def test_what_the_hub_has_is_fetched_and_nothing_is_made(monkeypatch, tmp_path):
    def spec(source: dict, **tasks: list[str]) -> str:
        entries = {name: {"sizes": dict.fromkeys(splits, 5)} for name, splits in tasks.items()}
        about = {"source": source, "base_key": "k", "tasks": entries}
        return json.dumps(about | {"evaluation": {"batch_size": 1}, "training": TRAINING})

    online, here = {"hub": "a/b", "revision": "v1"}, {"world": "micro-lm"}
    plan = pd.DataFrame(
        {
            "base": ["far", "far", "near"],
            "spec": [
                spec(online, learn=["train", "test"]),
                spec(online, keep=["test"]),
                spec(here, keep=["test"], made=["train"]),
            ],
        }
    )
    sources = {
        "learn": {"reader": "hub", "dataset": "x/y"},
        "keep": {"reader": "hub", "dataset": "x/z"},
        "made": {"reader": "world"},
    }
    tasks = {name: SimpleNamespace(source=source) for name, source in sources.items()}
    downloaded, read = [], []

    def make_base(spec: dict, folder: Path, report) -> dict:
        downloaded.append((spec["source"], folder))
        return {"model": str(folder / "model")}

    monkeypatch.setattr(module, "read_tasks", lambda folder: tasks)
    monkeypatch.setattr(module, "make_base", make_base)
    monkeypatch.setattr(module, "rows", lambda source, split, n: read.append((source, split)))
    layout, lines = Layout(tmp_path, tmp_path / "results"), []
    assert module.fetch(plan, layout, lines.append) == 3
    assert downloaded == [(online, layout.base("far", "k"))]
    assert read == [
        (sources["keep"], "test"),
        (sources["learn"], "test"),
        (sources["learn"], "train"),
    ]
    assert [line.split(":")[0] for line in lines] == ["far", "keep", "learn"]
