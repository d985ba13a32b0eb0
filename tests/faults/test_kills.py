"""Kill -9 at random moments of every stage: a rerun ends as if nothing had happened.

A few stages by default, one trial each; `pytest tests/faults/test_kills.py --long --trials 40 -s`
makes 40 trials of every stage and counts them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import threading
from collections import Counter
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from kills import Stage, Warm, trial
from stages import SUITE as NAME

from ballast.community import pack
from ballast.files import write_json
from checkout import SUITE, Checkout

TINY = SUITE["bases"]["tiny"]
SMALL = {
    "suite": NAME,
    "bases": {
        "tiny": TINY,
        "lm": {
            "source": {"world": "micro-lm", "seed": 0},
            "upstream": ["lm_facts"],
            "targets": ["lm_dialect"],
        },
        "vlm": {
            "source": {"world": "micro-vlm", "seed": 0},
            "upstream": ["vlm_color"],
            "targets": ["vlm_icons"],
        },
    },
    "methods": {
        "full_st": {"targets": ["tiny_learn"]},
        "lora": {},
        "adalora": {"targets": ["tiny_learn"]},
        "pissa": {"targets": ["tiny_learn"]},
        "wise_ft": {"parents": ["full_st"], "targets": ["tiny_learn"]},
    },
    "training": SUITE["training"] | {"examples": 40},
    "curves": {"checkpoints": 2, "alphas": [0.5]},
}
STATES = ("empty", "planned", "ready", "parent", "done")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def root(place) -> Checkout:
    made = Checkout(place / "checkout")
    made.save_base()
    made.write_suite(**SMALL)
    return made


@pytest.fixture(scope="module")
def hub(root):
    """Address of a hub on the loopback that has the tiny base."""
    from test_bases import REVISIONS, Hub

    files = {p.name: p.read_bytes() for p in (root.root / "base").iterdir()}
    repositories = {"tiny/llama": {REVISIONS["main"]: files}}
    handler = type("Here", (Hub,), {"repositories": repositories, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def warm(root, place, hub):
    made = Warm(root.root, place / "log", HF_ENDPOINT=hub, HF_HOME=str(place / "hub"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def states(root, place, warm) -> dict[str, Path]:
    """Folders with what there is before each stage; cells by method in `cells` of the first."""
    folders = {name: place / "states" / name for name in STATES}
    for before, after in zip((None, *STATES), STATES, strict=False):
        if before:
            shutil.copytree(folders[before], folders[after])
        else:
            folders[after].mkdir(parents=True)
        _advance(after, folders[after], root, warm)
    return folders


def _advance(state: str, folder: Path, root: Checkout, warm: Warm) -> None:
    if state == "empty":
        config = yaml.safe_load((root.root / "config/config.yaml").read_text())
        request = {"config": config, "folder": str(root.root / "config"), "key": "0"}
        write_json(folder / "request.json", request)
    elif state == "planned":
        warm.finish(folder, "plan", "request.json")
    elif state == "ready":
        for base in SMALL["bases"]:
            warm.finish(folder, "base", base)
    elif state == "parent":
        warm.finish(folder, "cell", cell_of(folder, "tiny", "full_st"))
    elif state == "done":
        for name in cells_of(folder):
            if not (folder / "results" / NAME / "cells" / name / "run.json").exists():
                warm.finish(folder, "cell", name)


def cells_of(folder: Path) -> list[str]:
    """Ids of the plan, parents first."""
    from ballast.plan import read_plan

    return list(read_plan(folder / f"results/{NAME}/plan/0.parquet").index)


def cell_of(folder: Path, base: str, method: str) -> str:
    """The id of a base's cell of a method."""
    (name,) = [
        name
        for name in cells_of(folder)
        if name.split(".")[0] == base and name.split(".")[2].startswith(method)
    ]
    return name


def stage_of(kind: str, states: dict[str, Path]) -> Stage:
    """The stage that a name of `KINDS` stands for."""
    ready, parent, done = (states[name] for name in ("ready", "parent", "done"))

    def cell(base: str, method: str, state: Path, **where) -> Stage:
        return Stage(kind, ("cell", cell_of(ready, base, method)), state, **where)

    lora = cell_of(ready, "tiny", "lora")
    stages = {
        "plan": lambda: Stage(kind, ("plan", "request.json"), states["empty"]),
        "download": lambda: Stage(kind, ("download", "tiny/llama", "main"), states["planned"]),
        "pretraining": lambda: Stage(
            kind, ("base", "lm"), states["planned"], ("shared/bases",), (0.0, 0.5)
        ),
        "data": lambda: Stage(kind, ("base", "tiny"), states["planned"], ("shared/data",)),
        "features": lambda: Stage(
            kind, ("base", "vlm"), states["planned"], ("shared/data",), (0.5, 1.0)
        ),
        "untouched scores": lambda: Stage(
            kind, ("base", "tiny"), states["planned"], ("shared/scores", "faults/bases"), (0.5, 1.0)
        ),
        "training": lambda: cell("tiny", "lora", ready, window=(0.0, 0.8)),
        "training with state": lambda: cell("tiny", "adalora", ready),
        "decomposition": lambda: cell("tiny", "pissa", ready, files=("decompositions",)),
        "vision-language cell": lambda: cell("vlm", "lora", ready),
        "checkpoint": lambda: cell("tiny", "lora", ready, files=("checkpoint",)),
        "adapter": lambda: cell("tiny", "lora", ready, files=("adapter", "curve.csv")),
        "evaluation": lambda: cell(
            "tiny", "lora", ready, files=("samples", "items", "changes"), window=(0.5, 1.0)
        ),
        "record": lambda: cell("tiny", "lora", ready, files=("run.json",), window=(0.9, 1.0)),
        "post-hoc edit": lambda: cell("tiny", "wise_ft", parent),
        "rewind": lambda: Stage(kind, ("curve", lora, "rewind"), done),
        "trajectory": lambda: Stage(kind, ("curve", lora, "trajectory"), done),
        "tables and figures": lambda: Stage(kind, ("tables",), done),
        "pages": lambda: Stage(kind, ("pages",), done),
        "keep": lambda: Stage(kind, ("keep",), done),
        "merge": lambda: Stage(kind, ("take_in",), _with_bundles(done)),
    }
    return stages[kind]()


KINDS = (
    "plan", "download", "pretraining", "data", "features", "untouched scores", "training",
    "training with state", "decomposition", "vision-language cell", "checkpoint", "adapter",
    "evaluation", "record", "post-hoc edit", "rewind", "trajectory", "tables and figures", "pages",
    "keep", "merge",
)  # fmt: skip
QUICK = {"pretraining", "data", "checkpoint", "record", "post-hoc edit", "tables and figures"}
FEW = 3  # trials of a fault test by default; so many stages have one each


def _with_bundles(done: Path) -> Path:
    """The finished state with bundles of two origins, and another one of the first, to merge."""
    folder = done.with_name("bundles")
    if not folder.exists():
        shutil.copytree(done, folder)
        suite = folder / "results" / NAME
        for number, origin in enumerate(("lab", "other")):
            pack(suite, suite / "incoming" / f"{number}.zip", origin)
    return folder


@pytest.fixture(scope="module")
def counts():
    """What the trials did, printed at the end."""
    made: Counter[str] = Counter()
    yield made
    print("\n" + "\n".join(f"{name}: {count}" for name, count in made.items()), file=sys.stderr)


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.long) for k in KINDS]
)
def test_a_killed_stage_is_made_again_to_the_same_bytes(kind, states, warm, place, counts, trials):
    stage = stage_of(kind, states)
    stage.measure(warm, place)
    for seed in range(trials if trials > FEW else 1):
        trial(stage, seed, warm, place, counts)
    assert trials <= FEW or counts[f"{kind}: kills"] > 0


def test_two_undisturbed_runs_are_the_same_and_a_damaged_file_is_told(states, warm, place):
    """The comparison that the trials rest on sees a byte."""
    stage = stage_of("training", states)
    stage.measure(warm, place)
    first = json.dumps(stage.expected)
    stage.measure(warm, place)
    assert json.dumps(stage.expected) == first
    folder = stage.fresh(place)
    warm.finish(folder, *stage.work)
    path = next(folder.rglob("samples/*.parquet"))
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes()[:-1] + os.urandom(1))
    assert stage.expected[str(path.relative_to(folder))] == before
