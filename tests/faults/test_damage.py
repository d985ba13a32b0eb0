"""Damaged files: truncated, bits flipped, changed places, gone. None is ever silently used."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from checkout import Checkout

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import runs  # noqa: E402

KINDS = ("truncated", "flipped", "swapped", "missing")
# Every kind of file that a run leaves under results/, and whether anything is read from it again.
KNOWN = {
    "kept/tiny/.checksums.json", "kept/tiny/changes.parquet", "kept/tiny/curves.parquet",
    "kept/tiny/items.parquet", "kept/tiny/learning_rates.csv", "kept/tiny/records.parquet",
    "shared/bases/BASE/.lock", "shared/bases/BASE/base.json", "shared/bases/BASE/model/FILE.json",
    "shared/bases/BASE/model/FILE.jinja", "shared/bases/BASE/model/FILE.safetensors",
    "shared/data/BASE/TASK/SPLIT/FILE.json", "shared/data/BASE/TASK/SPLIT/FILE.arrow",
    "shared/data/BASE/TASK/identities.json", "shared/data/BASE/TASK/manifest.json",
    "shared/decompositions/BASE/HASH.safetensors",
    "shared/scores/BASE/TASK/items.parquet", "shared/scores/BASE/TASK/scores.json",
    "shared/scores/BASE/TASK/validation.json",
    "tiny/bases/FILE.json", "tiny/cells/CELL/.lock", "tiny/cells/CELL/adapter.safetensors",
    "tiny/cells/CELL/changes.json", "tiny/cells/CELL/curve.csv", "tiny/cells/CELL/items.parquet",
    "tiny/cells/CELL/run.json", "tiny/cells/CELL/samples/FILE.parquet",
    "tiny/community/ORIGIN/.checksums.json", "tiny/community/ORIGIN/changes.parquet",
    "tiny/community/ORIGIN/items.parquet", "tiny/community/ORIGIN/records.parquet",
    "tiny/.FILE.lock", "tiny/curves/FILE.json",
    "tiny/leaderboard/.checksums.json", "tiny/leaderboard/.complete",
    "tiny/leaderboard/cells/FILE.html", "tiny/leaderboard/index.html",
    "tiny/plan/.FILE.json", "tiny/plan/FILE.parquet",
    "tiny/tables/.checksums.json", "tiny/tables/.complete", "tiny/tables/FILE.csv",
    "tiny/tables/FILE.md", "tiny/tables/FILE.parquet", "tiny/tables/FILE.tex",
    "tiny/tables/PLACE/FILE.csv", "tiny/tables/PLACE/FILE.tex",
    "tiny/tune/.checksums.json", "tiny/tune/cells/CELL/.lock",
    "tiny/tune/cells/CELL/adapter.safetensors", "tiny/tune/cells/CELL/curve.csv",
    "tiny/tune/cells/CELL/run.json", "tiny/tune/cells/CELL/samples/FILE.parquet",
    "tiny/tune/learning_rates.csv", "tiny/tune/tuning.csv",
}  # fmt: skip


def kind_of(path: str) -> str:
    """A path with what differs from suite to suite replaced."""
    rules = (
        (r"^shared/(\w+)/[^/]+/", r"shared/\1/BASE/"),
        (r"^(shared/(?:data|scores)/BASE)/[^/]+/", r"\1/TASK/"),
        (r"^(shared/data/BASE/TASK)/(test|train|validation)/", r"\1/SPLIT/"),
        (r"^(shared/decompositions/BASE)/[^/]+\.", r"\1/HASH."),
        (r"cells/[^/]+/", "cells/CELL/"),
        (r"community/[^/.][^/]*/", "community/ORIGIN/"),
        (r"^tiny/tables/[^/]+/", "tiny/tables/PLACE/"),
    )
    for pattern, name in rules:
        path = re.sub(pattern, name, path)
    folder, _, name = path.rpartition("/")
    if path in KNOWN:
        return path
    dot = "." if name.startswith(".") else ""
    return f"{folder}/{dot}FILE{Path(name).suffix}"


@pytest.fixture(scope="module")
def server():
    """A pool of processes forked from one that has imported everything."""
    known = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "workflow")]
    os.environ["PYTHONPATH"] = os.pathsep.join([*known, os.environ.get("PYTHONPATH", "")])
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs"])
    with ProcessPoolExecutor(
        2, mp_context=context, initializer=runs.use_stand_ins, max_tasks_per_child=1
    ) as pool:
        yield pool


@pytest.fixture(scope="module")
def suite(tmp_path_factory, server) -> Path:
    """A checkout with a finished suite: two bases, trained and post-hoc cells, curves, and more."""
    made = Checkout(tmp_path_factory.mktemp("damage") / "suite")
    made.save_base()
    base = {"upstream": ["tiny_keep"], "targets": ["tiny_learn"]}
    made.write_suite(
        bases={
            "own": {"source": {"path": "BASE"}, **base},
            "hub": {"source": {"hub": "tiny/base"}, **base},
        },
        methods={
            "full_st": {"learning_rate": 0.05},
            "pissa": {"learning_rate": 0.05},
            "wise_ft": {},
        },
        curves={"alphas": [0.5], "methods": ["full_st"]},
        tuning={"factors": [1.0], "start": {"full_st": 0.05, "pissa": 0.05}},
    )
    found = server.submit(runs.make, str(made.root)).result()
    (made.root / "undisturbed.json").write_text(json.dumps(found))
    return made.root


def test_every_kind_of_file_that_a_run_leaves_is_known(suite):
    found = {kind_of(path) for path in runs.files_of(suite / "results")}
    assert found == KNOWN


def test_no_damaged_file_is_silently_used(suite, server, tmp_path, trials):
    """Trials of each way to damage a file, of every kind of file in turn."""
    by_kind: dict[str, list[str]] = {}
    for path in runs.files_of(suite / "results"):
        by_kind.setdefault(kind_of(path), []).append(path)
    draw = random.Random(int(os.environ.get("BALLAST_SEED", 0)))
    order = [kind for kind in by_kind for _ in KINDS]
    draw.shuffle(order)
    jobs = {}
    for number in range(4 * trials):
        where = order[number % len(order)]
        file, other = draw.choice(by_kind[where]), draw.choice(by_kind[where])
        how, action = KINDS[number % len(KINDS)], draw.choice(runs.COMMANDS)
        arguments = (file, other, how, action, draw.randrange(1 << 30))
        place = str(tmp_path / str(number))
        jobs[arguments] = server.submit(runs.trial, str(suite), place, *arguments)
    counts: Counter[str] = Counter()
    wrong = []
    for arguments, job in jobs.items():
        try:
            found = job.result(timeout=300)
            counts[f"{arguments[2]}: {found}"] += 1
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            wrong.append(f"{arguments}: {found}")
        print(*arguments, found, flush=True)  # of many trials, what there is when one is stopped
    print(f"\n{sum(counts.values())} trials: {dict(sorted(counts.items()))}")
    assert not wrong, "\n".join([f"{len(wrong)} of {len(jobs)}", *wrong])


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own: a file system in memory, which only root may mount."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "ballast-test", str(place)], capture_output=True
    )
    if made.returncode:
        pytest.skip(f"no disk can be mounted: {made.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


# Least and most room that what is still to be made may have, kB; with the most it is finished.
ROOM = {"cell": 600, "base": 1500, "tables": 6000}


def test_a_full_disk_is_told_and_is_no_result(suite, server, disk, trials):
    draw = random.Random(int(os.environ.get("BALLAST_SEED", 0)))
    counts: Counter[str] = Counter()
    for number in range(trials):
        what = sorted(ROOM)[number % 3]
        room = draw.randrange(ROOM[what])
        try:
            job = server.submit(runs.full_disk, str(suite), str(disk), what, room)
            counts[f"{what}: {job.result(timeout=300)}"] += 1
        except Exception as error:
            pytest.fail(f"{what} with {room} kB: {type(error).__name__}: {error}")
    print(f"\n{sum(counts.values())} trials: {dict(sorted(counts.items()))}")


@pytest.mark.parametrize("what", ["cell", "base"])
def test_results_that_cannot_be_written_to_are_told_before_work(what, suite, server, disk):
    job = server.submit(runs.read_only, str(suite), str(disk), what)
    assert job.result(timeout=300) == "told"
