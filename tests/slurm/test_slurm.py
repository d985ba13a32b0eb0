"""Ballast on a real SLURM: whole runs, limits and retries, and what is lost when things break.

The methods of these suites train alike, so an adapter that was interrupted and resumed has to be
the one of an undisturbed run on this machine, to the byte.
"""

from __future__ import annotations

import collections
import json
import re
import time

import pytest
from cluster_checkout import LIMITS

from checkout import SUITE
from comparison_of_runs import differences

pytestmark = pytest.mark.slurm
ALONE = ["--group-components", "small=1"]


@pytest.fixture(scope="module")
def plain(home) -> dict:
    """The cell of the method to which nothing happens, without SLURM."""
    home.snakemake(home.suite("alone", ["plain"]), "--until", "cell")
    return home.records("alone")["plain"]


def assert_same(record: dict, plain: dict, resumed: bool = True) -> None:
    """The cell ended as the undisturbed one did, and went on from a checkpoint."""
    assert record["status"] == "ok", record["failure"]
    adapter = "adapter.safetensors"
    assert record["files"][adapter] == plain["files"][adapter]
    assert record["scores"] == plain["scores"]
    assert bool(record["provenance"]["resumed_from"]) == resumed


def requests(home, since: int) -> dict[str, list[dict]]:
    """Submissions of cells that have started, by method, in their order; groups under `group`."""
    found = collections.defaultdict(list)
    for job in home.jobs(since):
        for path in home.root.glob(f"results/slurm/*cell*/**/{job['JobID']}.log"):
            methods = set(re.findall(r"cell=tiny\.tiny_learn\.(\w+)-r", path.read_text()))
            found[methods.pop() if len(methods) == 1 else "group"].append(job)
    return found


def megabytes(job: dict) -> int:
    return int(job["ReqMem"].removesuffix("M"))


def minutes(job: dict) -> int:
    hours, rest, _ = job["Timelimit"].split(":")
    return 60 * int(hours) + int(rest)


def test_a_suite_runs_to_its_leaderboard(home):
    home.snakemake(home.suite("local", SUITE["methods"], tuning=SUITE["tuning"]))
    since = home.last_job()
    path = home.write_suite(limits=LIMITS)
    output = home.slurm(f"--configfile={path}")
    assert "3 cells: 3 done" in output
    # The base, and all cells in one submission.
    assert [job["State"] for job in home.jobs(since)] == ["COMPLETED", "COMPLETED"]
    logs = [path.relative_to(home.root) for path in home.root.glob("results/slurm/**/*.log")]
    assert sorted(path.parts[2] for path in logs) == ["group_tiny-cells_cell", "rule_base"]
    folders = home.root / "results/local", home.root / "results/tiny"
    assert not differences(*folders, ignored=["suite", "id", "keys", "parents"])
    assert "Nothing to be done" in home.snakemake("-n")


def test_what_slurm_kills_is_tried_again_with_more_and_goes_on(home, plain):
    option = home.suite("killed", ["stalls", "grows"])
    since = home.last_job()
    run = home.start(option, *ALONE, "--set-resources", "cell:mem_mb=1500*attempt")
    run.until((home.root / "stalled").exists, "the third step")
    [stalled] = requests(home, since)["stalls"]
    assert minutes(stalled) == 15 + 3
    # Its time is over: SLURM itself ends it, as it would later.
    home.cluster.run("scontrol", "update", f"JobId={stalled['JobID']}", "TimeLimit=1")
    output = run.finish()
    jobs, records = requests(home, since), home.records("killed")
    for method in ("stalls", "grows"):
        first, last = jobs[method]
        assert last["State"] == "COMPLETED"
        assert minutes(last) == 30 + 3
        assert (megabytes(first), megabytes(last)) == (1500, 3000)
        assert_same(records[method], plain)
    assert jobs["stalls"][0]["State"] == "TIMEOUT"
    # The kernel killed the cell alone; its supervisor and Snakemake ended the job by themselves.
    assert jobs["grows"][0]["State"] in ("OUT_OF_MEMORY", "FAILED")
    assert f"oom-kill event(s) in StepId={jobs['grows'][0]['JobID']}" in home.cluster.log(
        "slurmd.log"
    )
    assert "2 done, 0 failed" in output


def test_what_the_supervisor_ends_is_tried_again_with_more_and_goes_on(home, plain):
    (home.root / "stalled").unlink(missing_ok=True)
    option = home.suite("over", ["stalls", "grows"], limits={"minutes": 2.5, "memory_mb": 1300})
    since = home.last_job()
    home.slurm(option, *ALONE)
    jobs, records = requests(home, since), home.records("over")
    for method in ("stalls", "grows"):
        first, last = jobs[method]
        assert (first["State"], last["State"]) == ("FAILED", "COMPLETED")
        assert (minutes(first), minutes(last)) == (3 + 3, 5 + 3)
        assert (megabytes(first), megabytes(last)) == (1300 + 1000, 2600 + 1000)
        assert_same(records[method], plain)
    logs = {p: p.read_text() for p in home.root.glob("results/slurm/*cell*/**/*.log")}
    for why in ("time: not finished after 2.5 minutes", "oom: used"):
        assert any(why in text for text in logs.values()), why


def test_a_cell_that_never_fits_its_memory_is_a_record_in_the_end(home):
    """SLURM takes the last job for a failed one, though its supervisor wrote the record."""
    option = home.suite("never", ["grows", "plain"])
    since = home.last_job()
    again = [option, *ALONE, "--retries", "1", "--set-resources", "cell:mem_mb=1500"]
    assert "1 done, 0 failed, 1 missing" in home.slurm(*again, code=1)
    assert len(requests(home, since)["grows"]) == 2
    assert "1 done, 1 failed" in home.slurm(*again)
    records = home.records("never")
    assert records["grows"]["failure"]["kind"] == "killed"
    assert records["grows"]["failure"]["attempts"] == 2
    assert len(requests(home, since)["grows"]) == 3
    log = home.root / "results/never/logs" / f"{records['grows']['id']}.log"
    assert "its record is put back" in log.read_text()


def test_when_retries_are_spent_the_failure_is_a_record(home):
    (home.root / "wait").touch()
    option = home.suite("spent", ["waits", "plain"], limits={"minutes": 0.8, "memory_mb": 3000})
    since = home.last_job()
    output = home.slurm(option, "--retries", "1")
    (home.root / "wait").unlink()
    records = home.records("spent")
    assert records["waits"]["failure"]["kind"] == "time"
    assert records["waits"]["failure"]["attempts"] == 2
    assert records["plain"]["status"] == "ok"
    assert "1 done, 1 failed" in output
    assert len(requests(home, since)["group"]) == 2


def test_one_killed_cell_of_a_group_costs_the_others_nothing(home, plain):
    option = home.suite("group", {"plain": {}, "dies": {}, "waits": {}})
    since = home.last_job()
    run = home.start(option)
    run.until(lambda: len(home.jobs(since)) == 2, "a second submission")
    # The submission went on after the one had died; Snakemake then removed all records.
    cells = home.root / "results/group/cells"
    made = {path.parent.name: path.stat().st_mtime_ns for path in cells.glob("*/adapter.*")}
    assert len(made) == 2
    run.finish()
    records = home.records("group")
    after = {path.parent.name: path.stat().st_mtime_ns for path in cells.glob("*/adapter.*")}
    assert made.items() <= after.items()
    for method in ("plain", "waits"):
        assert_same(records[method], plain, resumed=False)
        log = home.root / "results/group/logs" / f"{records[method]['id']}.log"
        assert "its record is put back" in log.read_text()
    assert_same(records["dies"], plain)
    assert [job["State"] for job in home.jobs(since)] == ["FAILED", "COMPLETED"]


def test_cancelled_jobs_and_daemons_that_go_away_lose_nothing(home, plain):
    cluster = home.cluster
    (home.root / "wait").touch()
    option = home.suite("broken", {"waits": {"ranks": [2]}}, seeds=[0, 1, 2])
    # Memory for two at a time.
    since = home.last_job()
    run = home.start(option, *ALONE, "--jobs", "3", "--set-resources", "cell:mem_mb=6000")
    cells = home.root / "results/broken/cells"
    states = lambda: [job["State"] for job in home.jobs(since)]  # noqa: E731
    run.until(lambda: len(list(cells.glob("*/checkpoint*"))) == 2, "two checkpoints")
    assert sorted(states()) == ["PENDING", "RUNNING", "RUNNING"]
    by_state = {job["State"]: job["JobID"] for job in home.jobs(since)}
    cluster.run("scancel", by_state["PENDING"], by_state["RUNNING"])
    run.until(lambda: len(states()) == 5, "both submitted again")
    cluster.stop_slurmctld()
    time.sleep(30)
    cluster.start_slurmctld()
    run.until(lambda: states().count("RUNNING") == 2, "two cells that run")
    cluster.kill_slurmd()
    time.sleep(5)
    cluster.start_slurmd()
    (home.root / "wait").unlink()
    run.finish()
    # Accounting adds by whom, but not after a restart.
    assert [state.split()[0] for state in sorted(states())[:2]] == ["CANCELLED"] * 2
    found = [json.loads(path.read_text()) for path in cells.glob("*/run.json")]
    assert [record["status"] for record in found] == ["ok"] * 3
    [first] = [record for record in found if record["identity"]["seed"] == 0]
    assert first["files"]["adapter.safetensors"] == plain["files"]["adapter.safetensors"]
    assert sum(bool(record["provenance"]["resumed_from"]) for record in found) >= 1


def test_cells_get_gpus_of_their_own_and_wait_for_them(home):
    option = home.suite(
        "gpus",
        {"notes": {"ranks": [2, 4, 8]}},
        limits={"minutes": 10, "memory_mb": 2000, "gpus": 1},
    )
    since = home.last_job()
    run = home.start(option, *ALONE, "--jobs", "3")
    run.until(lambda: len(list(home.root.glob("device.*"))) > 2, "devices")
    jobs = home.jobs(since)
    assert sorted(job["State"] for job in jobs) == ["PENDING", "RUNNING", "RUNNING"]
    assert all("gres/gpu=1" in job["AllocTRES"] for job in jobs if job["State"] == "RUNNING")
    run.finish()
    devices = collections.defaultdict(set)
    for path in home.root.glob("device.*"):
        devices[path.suffixes[0]].add(path.read_text())
    assert len(devices) == 3
    assert sorted(next(iter(found)) for found in devices.values())[::2] == ["0", "1"]
    assert all(len(found) == 1 for found in devices.values())


def test_a_killed_snakemake_is_followed_by_one_that_finishes(home, plain):
    (home.root / "wait").touch()
    option = home.suite("left", ["waits", "plain"])
    since = home.last_job()
    run = home.start(option, *ALONE)
    cells = home.root / "results/left/cells"
    run.until(lambda: list(cells.glob("*/checkpoint*")), "a checkpoint")
    run.kill()
    assert "--unlock" in home.slurm(option, code=1)
    home.snakemake("--unlock", option)
    # The job of the dead run still holds the cell: the new one's waits for it.
    again = home.start(option, *ALONE)
    again.until(lambda: len(home.jobs(since)) > 2, "submitted again")
    time.sleep(20)
    (home.root / "wait").unlink()
    assert "2 cells: 2 done" in again.finish()
    records = home.records("left")
    for method in ("waits", "plain"):
        assert_same(records[method], plain, resumed=False)


def test_equal_large_cells_go_as_an_array_and_different_ones_do_not(home, plain):
    option = home.suite("array", {"plain": {"ranks": [2, 4, 8]}}, limits=LIMITS | {"minutes": 20})
    arrays = ["--slurm-array-jobs", "cell", "--jobs", "3"]
    since = home.last_job()
    home.slurm(option, *arrays)
    jobs = [job["JobID"] for job in home.jobs(since)]
    assert len({job.partition("_")[0] for job in jobs}) == 1
    assert sorted(job.partition("_")[2] for job in jobs) == ["1", "2", "3"]
    base = SUITE["bases"]["tiny"]
    bases = {name: base | {"limits": {"minutes": 20 * i}} for i, name in enumerate(("a", "b"), 1)}
    different = home.write_suite("different", suite="different", bases=bases, limits=None)
    output = home.slurm(f"--configfile={different}", *arrays, code=1)
    assert "ask for 2 different things" in output
