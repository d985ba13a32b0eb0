"""A whole suite through Snakemake: what a person sees from the first run to the last repair.

The tests follow one another in one checkout, as a person's days with it would; run them in order.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import time

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file

from ballast.files import write_sealed
from ballast.records import validate_record
from ballast.tensorfile import read_tensors, tensors_digest, write_tensors
from checkout import SUITE, Checkout

METHOD = '''"""A method of the tests: LoRA, and something that goes wrong."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

from ballast.declare import Declaration

from .lora import Hyper, attach, initialise

declaration = Declaration(
    title="{name}",
    citation="the tests",
    family="reparameterization",
    rank="inner dimension",
    merges=True,
    random_start=True,
    learning_rate=1e-3,
)
BROKEN = Path("break")
SLOW = Path("slow")


'''
RAISES = """def after_step(ctx):
    if BROKEN.exists() and ctx.step == 3:
        raise ValueError("no\\nluck today")
"""
DIVERGES = """def penalty(ctx):
    if BROKEN.exists() and ctx.step == 2:
        return float("nan") * sum(p.sum() for p in ctx.own().values())
"""
HANGS = """def after_step(ctx):
    if BROKEN.exists() and ctx.step == 3:
        time.sleep(3600)
"""
GROWS = """HELD = []


def after_step(ctx):
    while BROKEN.exists():
        HELD.append(torch.ones(25_000_000))
        time.sleep(0.05)
"""
KILLED = """def after_step(ctx):
    if BROKEN.exists() and ctx.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
"""
EXITS = """def after_step(ctx):
    if BROKEN.exists() and ctx.step == 3:
        raise SystemExit(0)
"""
VANISHES = """def after_step(ctx):
    if BROKEN.exists() and ctx.step == 3:
        os._exit(0)
"""
CRASHES = """def after_step(ctx):
    if BROKEN.exists() and ctx.step == 3:
        __import__("ctypes").string_at(0)
"""
MUTE = """def after_step(ctx):
    if BROKEN.exists():
        __import__("sys").stderr.close()
"""
BLOWS = """def after_step(ctx):
    if BROKEN.exists() and ctx.step == 6:
        for value in ctx.own().values():
            value.data.fill_(1e30)
"""
SLOW = """def after_step(ctx):
    if SLOW.exists():
        time.sleep(1)
"""
EDITS = '''"""A method of the tests: WiSE-FT, and something that goes wrong."""

from pathlib import Path

from ballast.declare import Declaration

from . import wise_ft
from .wise_ft import Hyper

declaration = Declaration(
    title="Edits",
    citation="the tests",
    family="post-hoc",
    merges=True,
    unchanged_at_start=False,
    parents=("last_st",),
)


def post_hoc(ctx):
    if Path("break").exists():
        raise ValueError("no edit today")
    return wise_ft.post_hoc(ctx)
'''
FAILING = {
    "raises": RAISES,
    "diverges": DIVERGES,
    "hangs": HANGS,
    "grows": GROWS,
    "killed": KILLED,
    "exits": EXITS,
    "vanishes": VANISHES,
    "crashes": CRASHES,
    "mute": MUTE,
    "blows": BLOWS,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Checkout:
    made = Checkout(tmp_path_factory.mktemp("checkout"))
    made.save_base()
    return made


def drop_in(home: Checkout, name: str, body: str = "") -> None:
    (home.root / "methods" / f"{name}.py").write_text(METHOD.format(name=name) + body)


def contents(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def adapter_of(record) -> str:
    return record["files"]["adapter.safetensors"]


def planned(home: Checkout, *arguments: str) -> set[str]:
    """Ids of the cells that a dry run would make."""
    output = home.snakemake("-n", "--quiet", "host", *arguments)
    lines = [line.strip() for line in output.splitlines()]
    return {line.removeprefix("wildcards: cell=") for line in lines if "wildcards: cell=" in line}


def test_the_first_run_ends_with_a_leaderboard(home):
    output = home.snakemake()
    assert "tiny: 3 cells, 0 done; 3 to do" in output
    tables = home.root / "results/tiny/tables"
    board = (tables / "leaderboard.md").read_text()
    for title in ("Full-ST", "LoRA", "WiSE-FT"):
        assert title in output.rpartition("3 of 3 steps")[2]
        assert title in board
    records = home.records()
    assert set(records) == {"full_st", "lora", "wise_ft"}
    for record in records.values():
        validate_record(record)
        assert record["status"] == "ok"
    assert records["lora"]["settings"]["training"]["steps"] == 6
    assert records["wise_ft"]["identity"]["parents"] == [records["full_st"]["id"]]
    assert set(pd.read_parquet(tables / "cells.parquet")["status"]) == {"ok"}
    assert (home.root / "results/tiny/figures/tradeoff.png").stat().st_size > 5000
    assert not list(home.root.glob("results/tiny/cells/*/checkpoint*"))


def test_a_second_run_says_that_nothing_is_to_be_done(home):
    before = home.times("run.json")
    assert "Nothing to be done" in home.snakemake()
    assert home.times("run.json") == before


def test_results_may_lie_on_another_disk(home, tmp_path_factory):
    """All that follows works through the link."""
    place = tmp_path_factory.mktemp("scratch") / "results"
    shutil.move(home.root / "results", place)
    (home.root / "results").symlink_to(place)
    assert "Nothing to be done" in home.snakemake()


def test_snakemakes_own_report_shows_tables_and_figures(home):
    home.snakemake("--report", "report.html")
    page = (home.root / "report.html").read_text()
    for shown in ("Leaderboard", "Trade-off", "Rank sweep", "Mean ranks", "Forgetting"):
        assert f'"{shown}"' in page
    for file in ("leaderboard.md", "tradeoff.svg", "ranks-tiny-tiny_learn.svg"):
        assert file in page


def test_an_edited_method_file_reruns_only_its_own_cells(home):
    before, base = home.times("run.json"), home.root / "results/tiny/bases/tiny.json"
    ready = base.stat().st_mtime_ns
    path = home.root / "methods/lora.py"
    path.write_text(path.read_text() + "\n# edited\n")
    assert planned(home) == {home.records()["lora"]["id"]}
    home.snakemake()
    after = home.times("run.json")
    assert {m for m in after if after[m] != before[m]} == {"lora"}
    assert base.stat().st_mtime_ns == ready
    assert "Nothing to be done" in home.snakemake("-n")


def test_an_edited_task_scores_again_without_training(home):
    records, adapters = home.records(), home.times("adapter.safetensors")
    path = home.root / "workflow/tasks/tiny/tiny_keep.yaml"
    path.write_text(path.read_text().replace("version: 1", "version: 2"))
    home.snakemake()
    assert home.times("adapter.safetensors") == adapters
    for method, record in home.records().items():
        assert record["keys"]["eval"] != records[method]["keys"]["eval"]
        assert record["keys"]["train"] == records[method]["keys"]["train"]
        assert adapter_of(record) == adapter_of(records[method])
        for phase in ("train", "attach"):
            assert record["costs"]["seconds"][phase] == records[method]["costs"]["seconds"][phase]


def test_leaderboard_trains_nothing_and_names_what_is_stale(home):
    before = home.times("run.json")
    path = home.root / "methods/full_st.py"
    text = path.read_text()
    path.write_text(text + "\n# edited\n")
    output = home.snakemake("leaderboard")
    assert home.times("run.json") == before
    table = pd.read_parquet(home.root / "results/tiny/tables/cells.parquet")
    status = table.set_index("method")["status"].to_dict()
    assert status == {"full_st": "stale", "lora": "ok", "wise_ft": "stale"}
    assert "stale" in output
    assert "stale" in (home.root / "results/tiny/tables/leaderboard.md").read_text()
    path.write_text(text)
    # Put back, the cells are current again, and the next run's tables say so.
    assert "tables" in home.snakemake("-n", "--quiet", "host")
    assert planned(home) == set()


def test_a_removed_record_is_made_again(home):
    adapters, record = home.times("adapter.safetensors"), home.records()["full_st"]
    (home.root / "results/tiny/cells" / record["id"] / "run.json").unlink()
    home.snakemake()
    assert home.times("adapter.safetensors") == adapters
    again = home.records()["full_st"]
    assert again["scores"] == record["scores"]
    table = pd.read_parquet(home.root / "results/tiny/tables/cells.parquet")
    assert set(table["status"]) == {"ok"}


def test_what_was_made_of_other_weights_of_its_parent_is_made_again(home):
    """The same training on another machine rounds differently, under the same key."""
    before = home.records()
    cells = home.root / "results/tiny/cells"
    parent, child = (cells / before[method]["id"] for method in ("full_st", "wise_ft"))
    assert before["wise_ft"]["provenance"]["parents"] == {
        parent.name: adapter_of(before["full_st"])
    }
    tensors, about = read_tensors(parent / "adapter.safetensors")
    tensors = {name: 1.5 * value for name, value in tensors.items()}
    about["digest"] = tensors_digest(tensors)
    write_tensors(parent / "adapter.safetensors", tensors, about)
    before["full_st"]["files"]["adapter.safetensors"] = about["digest"]
    write_sealed(parent / "run.json", before["full_st"])
    home.snakemake()
    after = home.records()
    assert after["wise_ft"]["provenance"]["parents"] == {parent.name: about["digest"]}
    assert adapter_of(after["wise_ft"]) != adapter_of(before["wise_ft"])
    base = load_file(home.root / "base/model.safetensors")
    for name, value in read_tensors(child / "adapter.safetensors")[0].items():
        half = (base[name.removeprefix("weight.")] + tensors[name]) / 2
        torch.testing.assert_close(value, half, rtol=0, atol=1e-7)
    (child / "run.json").unlink()
    home.snakemake()
    log = (home.root / f"results/tiny/logs/{child.name}.log").read_text()
    assert "trained before; scoring only" in log


def test_tables_made_again_have_the_same_bytes(home):
    results = home.root / "results/tiny"
    before = {name: contents(results / name) for name in ("tables", "figures")}
    home.snakemake("leaderboard")
    assert {name: contents(results / name) for name in ("tables", "figures")} == before
    assert "Nothing to be done" in home.snakemake("-n")


def test_a_new_method_file_adds_its_own_cells_and_no_other(home):
    path = str(home.write_suite("everything", suite="everything", methods="all"))
    before = planned(home, "--configfile", path)
    drop_in(home, "newcomer")
    after = planned(home, "--configfile", path)
    assert before < after
    assert [cell.split(".")[2] for cell in after - before] == ["newcomer-r2"]
    assert not (home.root / "results/everything/cells").exists()


def test_a_bad_suite_is_refused_in_one_message(home):
    methods = {"loar": {}}
    path = home.write_suite("bad", suite="bad", methods=methods)
    output = home.snakemake("--configfile", str(path), code=1)
    assert output.count("unknown method 'loar'; did you mean 'lora'?") == 1
    assert "Traceback" not in output
    assert not (home.root / "results/bad").exists()


def test_a_killed_run_resumes_to_the_same_bytes(home):
    drop_in(home, "slow", SLOW)
    path = str(home.write_suite("resume", suite="resume", methods=["slow"]))
    (home.root / "slow").touch()
    command = ["snakemake", "--cores", "2", "--configfile", path]
    log = (home.root / "killed.log").open("w")
    with subprocess.Popen(
        command, cwd=home.root, env=home.environment, stdout=log, stderr=log, start_new_session=True
    ) as run:
        limit = time.monotonic() + 120
        while not list(home.root.glob("results/resume/cells/*/checkpoint*")):
            assert time.monotonic() < limit, "no checkpoint was written"
            assert run.poll() is None, "Snakemake ended before a checkpoint was written"
            time.sleep(0.05)
        family = psutil.Process(run.pid).children(recursive=True)
        assert len(family) >= 2
        run.send_signal(signal.SIGKILL)
        run.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, "children outlived Snakemake"
    assert not home.records("resume")
    (home.root / "slow").unlink()
    assert "--unlock" in home.snakemake("--configfile", path, code=1)
    home.snakemake("--configfile", path, "--unlock")
    home.snakemake("--configfile", path)
    slow, lora = home.records("resume")["slow"], home.records()["lora"]
    assert slow["provenance"]["resumed_from"] in (2, 4)
    # `slow` computes as LoRA does, with the same seed, data and settings.
    assert adapter_of(slow) == adapter_of(lora)
    assert slow["scores"] == lora["scores"]


def test_tune_writes_rates_and_curves(home):
    path = str(home.root / "config/resume.yaml")
    output = home.snakemake("tune", "--configfile", path)
    folder = home.root / "results/resume/tune"
    table = pd.read_csv(folder / "learning_rates.csv")
    assert table["learning_rate"].tolist() == [0.0005, 0.001]
    assert table["seed"].unique().tolist() == [100]
    assert table["status"].unique().tolist() == ["ok"]
    assert (folder / "curves.svg").stat().st_size > 2000
    assert (folder / "curves.png").stat().st_size > 2000
    assert "learning_rate" in output
    assert table["default"].tolist() == [False, True]
    assert table[["E", "F"]].notna().all(axis=None)
    assert len(pd.read_csv(folder / "tuning.csv")) == 1
    # The target was scored on validation alone, and the cells of the results are other ones.
    for record in (json.loads(p.read_text()) for p in folder.glob("cells/*/run.json")):
        n = {name: score["n"] for name, score in record["scores"].items()}
        assert n["tiny_learn"] < n["tiny_keep"] == 12
        assert {name: score["n"] for name, score in record["base_scores"].items()} == n


def test_curves_are_made_on_demand_and_belong_to_no_run(home):
    path = str(home.root / "config/resume.yaml")
    assert "rule curve:" not in home.snakemake("-n", "--configfile", path)
    output = home.snakemake("rewind", "trajectories", "--configfile", path)
    for kind in ("rewind", "trajectory"):
        assert f"{kind} of 1 cells" in output
    curves = [json.loads(p.read_text()) for p in home.root.glob("results/resume/curves/*.json")]
    assert sorted(curve["kind"] for curve in curves) == ["rewind", "trajectory"]
    assert all(curve["identical"] is True for curve in curves)
    assert "rule curve:" not in home.snakemake("rewind", "-n", "--configfile", path)
    assert len(home.records("resume")) == 1


@pytest.fixture(scope="module")
def failing(home) -> str:
    """A suite of methods that fail while the file `break` lies in the working directory."""
    for name, body in FAILING.items():
        drop_in(home, name, body)
    (home.root / "methods/edits.py").write_text(EDITS)
    methods = [*FAILING, "last_st", "edits", "wise_ft"]
    return str(
        home.write_suite(
            "failing",
            suite="failing",
            methods={name: {} for name in methods} | {"wise_ft": {"parents": ["raises-r2"]}},
            training={k: v for k, v in SUITE["training"].items() if k != "weight_decay"},
            tuning=None,
            limits={"minutes": 1.5, "memory_mb": 1800},
        )
    )


def test_failures_are_results_and_stop_nobody(home, failing):
    (home.root / "break").touch()
    output = home.snakemake("--configfile", failing)
    records = home.records("failing")
    failures = {m: r["failure"] for m, r in records.items() if r["status"] == "failed"}
    assert {method: failure["kind"] for method, failure in failures.items()} == {
        "raises": "raised",
        "diverges": "diverged",
        "hangs": "time",
        "grows": "oom",
        "killed": "killed",
        "exits": "raised",
        "vanishes": "raised",
        "crashes": "killed",
        "mute": "raised",
        "blows": "diverged",
        "edits": "raised",
        "wise_ft": "raised",
    }
    assert failures["raises"]["reason"] == "in after_step: ValueError: no luck today"
    assert failures["diverges"]["reason"].startswith("step 3: loss")
    assert failures["blows"]["reason"].endswith("is no finite number: its outputs overflow")
    assert failures["edits"]["reason"] == "in post_hoc: ValueError: no edit today"
    parent = records["raises"]["id"]
    assert (
        failures["wise_ft"]["reason"] == f"parent {parent} failed: {failures['raises']['reason']}"
    )
    assert failures["hangs"]["reason"] == "not finished after 1.5 minutes, the limit"
    assert failures["grows"]["reason"].endswith("limit 1800 MB")
    assert failures["killed"]["reason"].startswith("killed by SIGKILL at ")
    assert failures["exits"]["reason"] == "SystemExit: 0"
    assert failures["vanishes"]["reason"] == "the process ended with exit code 0 and no record"
    assert failures["crashes"]["reason"].startswith("killed by SIGSEGV at ")
    assert records["last_st"]["status"] == "ok"
    board = (home.root / "results/failing/tables/leaderboard.md").read_text()
    for method, failure in failures.items():
        validate_record(records[method])
        assert records[method]["method"]["title"] in board
        assert failure["reason"][:25] in board
        assert failure["reason"][:25] in output
    assert "Nothing to be done" in home.snakemake("-n", "--configfile", failing)


def test_another_suite_takes_nothing_from_the_default_one(home, failing):
    record = home.records("failing")["last_st"]
    assert record["settings"]["training"]["weight_decay"] == 0.0
    assert record["settings"]["learning_rate_source"] == "method's default"
    assert set(home.records("failing")) == {*FAILING, "last_st", "edits", "wise_ft"}
    assert set(home.records()) == {"full_st", "lora", "wise_ft"}
    assert "Nothing to be done" in home.snakemake("-n")


def test_retry_tries_the_failed_cells_and_no_other(home, failing):
    (home.root / "break").unlink()
    before = home.times("run.json", "failing")
    output = home.run("ballast", "retry", failing, "--", "--cores", "2")
    assert "12 failed cells to try again" in output
    records, after = home.records("failing"), home.times("run.json", "failing")
    assert {record["status"] for record in records.values()} == {"ok"}
    assert {m for m in after if after[m] == before[m]} == {"last_st"}
    for method in ("raises", "diverges", "hangs", "killed", "exits", "vanishes", "crashes"):
        assert records[method]["provenance"]["resumed_from"] == 2
    assert home.run("ballast", "retry", failing).startswith("0 failed cells")
