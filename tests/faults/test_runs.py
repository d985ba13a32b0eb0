"""Whole runs: killed at random moments, two at a time, and under clocks that jump."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
import uuid
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from kills import without_times

from checkout import Checkout

COSTS = ("seconds", "memory", "ms", "bytes", "time", "resumed")
TAG = "FAULT_TRIAL"
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


def leaderboard(results: Path) -> dict[str, Any]:
    """What a run ends with, times apart: records, the tidy table, the leaderboard's text."""
    home = results / "tiny"
    table = pd.read_parquet(home / "tables/cells.parquet")
    kept = [name for name in table if not any(word in name for word in COSTS)]
    records = [json.loads(path.read_text()) for path in sorted(home.glob("cells/*/run.json"))]
    parts = [str(path) for path in results.rglob("*.part*")]
    assert not parts
    return {
        "records": without_times(records),
        "table": table[kept].to_json(),
        "text": (home / "tables/leaderboard.md").read_text(),
        "pages": sorted(p.name for p in (home / "leaderboard").rglob("*.html")),
        "figures": {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted((home / "figures").glob("*.svg"))
        },
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Checkout:
    made = Checkout(tmp_path_factory.mktemp("runs"))
    made.save_base()
    return made


@pytest.fixture(scope="module")
def undisturbed(home) -> tuple[dict[str, Any], float]:
    """The leaderboard of a run that nothing disturbs, and how long it took, in seconds."""
    started = time.monotonic()
    home.snakemake()
    return leaderboard(home.root / "results"), time.monotonic() - started


def start(home: Checkout, tag: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """A run in a session of its own, its processes known by a tag; output in TAG.log."""
    log = (home.root / f"{tag}.log").open("w")
    return subprocess.Popen(
        ["snakemake", "--cores", "2", *arguments],
        cwd=home.root,
        env=home.environment | {TAG: tag} | environment,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def tagged(tag: str) -> list[psutil.Process]:
    """Processes of a run, whoever their parents are by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(TAG) == tag:
                found.append(process)
        except psutil.Error:
            continue
    return found


def ended(tag: str, seconds: float = 8) -> bool:
    """Whether no process of a run is left within some seconds."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if not tagged(tag):
            return True
        time.sleep(0.1)
    return False


def afresh(home: Checkout) -> None:
    for name in ("results", ".snakemake"):
        shutil.rmtree(home.root / name, ignore_errors=True)


def kill(run: subprocess.Popen, tag: str, whom: str, draw: random.Random) -> None:
    """Kill -9 Snakemake, one of the run's other processes, or the whole group at once."""
    if whom == "group":
        os.killpg(run.pid, signal.SIGKILL)
    elif whom == "snakemake":
        run.kill()
    else:
        words = {"supervisor": "cell.py", "cell": "ballast.cell", "any": ""}[whom]
        chosen = []
        for process in tagged(tag):
            try:
                if words in " ".join(process.cmdline()):
                    chosen.append(process)
            except psutil.Error:
                continue
        if chosen:
            try:
                draw.choice(chosen).kill()
            except psutil.NoSuchProcess:
                return


WHOM = ("snakemake", "group", "supervisor", "cell", "any")


def killed_run(home: Checkout, seed: int, seconds: float) -> list[str]:
    """A run killed some times at random moments and begun again each time; what was done to it."""
    draw, story = random.Random(seed), []
    afresh(home)
    for number in range(3):
        tag = uuid.uuid4().hex
        # A killed cell is tried again, as a cluster would; nobody else has to be asked twice.
        run = start(home, tag, "--retries", "3")
        delay, whom = draw.uniform(0.5, seconds), draw.choice(WHOM)
        try:
            run.wait(delay)
            story.append("ended by itself")
            return story
        except subprocess.TimeoutExpired:
            kill(run, tag, whom, draw)
        story.append(f"{whom} after {delay:.1f} s")
        if whom in ("snakemake", "group") or number == 2:
            run.wait()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGINT)
            run.wait()
        if number < 2 or run.returncode == -signal.SIGKILL:
            assert ended(tag), f"seed {seed}, {story}: {[p.cmdline() for p in tagged(tag)]} live on"
        if run.returncode == -signal.SIGKILL:
            home.snakemake("--unlock")
    return story


def check_killed_run(home: Checkout, undisturbed, seed: int) -> None:
    expected, seconds = undisturbed
    story = killed_run(home, seed, seconds)
    home.snakemake("--retries", "3")
    found = leaderboard(home.root / "results")
    for part, value in expected.items():
        assert found[part] == value, f"seed {seed}, {story}: other {part}"
    assert "Nothing to be done" in home.snakemake("-n"), f"seed {seed}, {story}"
    print(f"run, seed {seed}: {story}")


def test_a_run_killed_again_and_again_ends_with_the_same_leaderboard(home, undisturbed):
    check_killed_run(home, undisturbed, 0)


@pytest.mark.long
def test_many_runs_killed_again_and_again(home, undisturbed, trials):
    for seed in range(1, trials + 1):
        check_killed_run(home, undisturbed, seed)


def test_a_second_run_is_refused_and_after_ctrl_c_no_unlocking_is_needed(home, undisturbed):
    check_stopped_run(home, undisturbed, signal.SIGINT)


@pytest.mark.long
def test_after_a_sigterm_no_unlocking_is_needed(home, undisturbed):
    check_stopped_run(home, undisturbed, signal.SIGTERM)


def check_stopped_run(home: Checkout, undisturbed, number: signal.Signals) -> None:
    """A run beside which a second is refused, and which is stopped while its cells train."""
    afresh(home)
    tag = uuid.uuid4().hex
    run = start(home, tag)
    limit = time.monotonic() + 300
    while not list(home.root.glob("results/tiny/cells/*/.lock")):
        assert time.monotonic() < limit
        assert run.poll() is None
        time.sleep(0.05)
    said = home.snakemake(code=1)
    assert "Directory cannot be locked" in said
    assert "--unlock" in said
    assert "Traceback" not in said
    # Ctrl-C goes to the whole group of a terminal, a SIGTERM to the one that is named.
    if run.poll() is None:
        os.killpg(run.pid, number) if number == signal.SIGINT else run.terminate()
        assert run.wait(60) != 0
    assert ended(tag)
    assert not [r for r in home.records().values() if r["status"] != "ok"]
    home.snakemake()
    assert leaderboard(home.root / "results") == undisturbed[0]


@pytest.mark.long
def test_two_runs_without_snakemakes_lock_harm_nothing(home, undisturbed, trials):
    for seed in range(trials):
        afresh(home)
        draw = random.Random(seed)
        first = start(home, uuid.uuid4().hex, "--nolock")
        time.sleep(draw.uniform(0, undisturbed[1]))
        second = start(home, uuid.uuid4().hex, "--nolock")
        codes = first.wait(), second.wait()
        home.snakemake("--nolock")
        found = leaderboard(home.root / "results")
        for part, value in undisturbed[0].items():
            assert found[part] == value, f"seed {seed}: other {part}"
        print(f"two runs, seed {seed}: exit codes {codes}")


def test_dates_in_the_future_make_nothing_again_and_again(home, undisturbed):
    home.snakemake()
    results = home.root / "results/tiny"
    ahead = time.time() + 86400
    for number, path in enumerate(sorted(results.glob("cells/*/run.json"))):
        os.utime(path, (ahead + number, ahead + number))
    os.utime(results / "bases/tiny.json", (ahead, ahead))
    before = home.times("adapter.safetensors")
    home.snakemake()
    assert home.times("adapter.safetensors") == before
    assert "Nothing to be done" in home.snakemake("-n")
    assert leaderboard(home.root / "results") == undisturbed[0]


@pytest.mark.long
@pytest.mark.skipif(not FAKETIME.exists(), reason="libfaketime is missing (apt install faketime)")
def test_a_clock_that_jumps_during_a_run_changes_no_record(home, undisturbed, tmp_path):
    afresh(home)
    offset = tmp_path / "offset"
    offset.write_text("+0\n")
    tag = uuid.uuid4().hex
    run = start(
        home,
        tag,
        LD_PRELOAD=str(FAKETIME),
        FAKETIME_TIMESTAMP_FILE=str(offset),
        FAKETIME_NO_CACHE="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
    )
    draw = random.Random(0)
    while run.poll() is None:
        time.sleep(0.7)
        offset.write_text(f"{draw.choice(['+', '-'])}{draw.randrange(100_000)}\n")
    if run.returncode:
        home.snakemake()
    found = home.records()
    assert leaderboard(home.root / "results") == undisturbed[0]
    for record in found.values():
        spent = record["costs"]["seconds"]
        assert all(0 <= seconds < 600 for seconds in spent.values()), spent
        first = record["costs"]["first_step_seconds"]
        assert first is None or 0 < first < 600
    assert "Nothing to be done" in home.snakemake("-n")
