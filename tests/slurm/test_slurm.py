"""Ballast on a real SLURM: whole runs, limits and retries, and what is lost when things break.

Every method of these suites trains as LoRA does, so an adapter that was interrupted, killed and
resumed has to be the one of the LoRA cell of an undisturbed run on this machine, to the byte.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def alone(home) -> dict:
    """Records by method of a run without SLURM."""
    home.snakemake()
    return home.records()


def same(record: dict, lora: dict) -> bool:
    return record["status"] == "ok" and (
        record["files"]["adapter.safetensors"] == lora["files"]["adapter.safetensors"]
        and record["scores"] == lora["scores"]
    )


def test_cancelled_running_and_pending(home, alone):
    home.write_suite()
    methods = {"slow": {}}
    option = home.suite("cancelled", methods, seeds=[0], limits={"minutes": 20, "memory_mb": 2000})
    (home.root / "slow").touch()
    since = home.last_job()
    run = home.start(option)
    run.until(lambda: list(home.root.glob("results/cancelled/cells/*/checkpoint*")), "a checkpoint")
    (home.root / "slow").unlink()
    [job] = home.jobs(since)
    home.cluster.run("scancel", job["JobID"])
    print(run.finish(seconds=200))
    print(home.jobs(since))
    record = home.records("cancelled")["slow"]
    assert same(record, alone["lora"])
    assert record["provenance"]["resumed_from"] > 0
