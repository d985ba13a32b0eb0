"""The tiny checkout, run on a SLURM; methods that are slow, or use much memory, or note a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import Cluster

from checkout import Checkout

# Far from what a cell takes, so that a busy machine meets none that a test does not mean.
LIMITS = {"minutes": 15, "memory_mb": 3000}

# All train alike: with the same seed, data and settings their adapters are the same.
METHOD = '''"""A method of the tests: LoRA; it {what}."""

from __future__ import annotations

import os
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
HELD = []
STEP = 0


def once(name):
    if STEP < 3 or Path(name).exists():
        return False
    Path(name).touch()
    return True


def note_device():
    Path(f"device.{{os.getpid()}}.{{STEP}}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    time.sleep(2)


def after_step(ctx):
    global STEP
    STEP = ctx.step
    {body}
'''
# A checkpoint is written after the second step: what happens, happens later.
BODIES = {
    # Once: the first to come here waits for ever.
    "stalls": "once('stalled') and time.sleep(3600)",
    "dies": "once('died') and os.kill(os.getpid(), 9)",
    # As long as the file is there.
    "waits": "while Path('wait').exists() and ctx.step >= 3: time.sleep(0.2)",
    # Always: it needs 1.5 GB more than LoRA, long enough for the supervisor to see it.
    "grows": "ctx.step == 3 and (HELD.append(torch.ones(375_000_000)) or time.sleep(3))",
    "notes": "note_device()",
    "plain": "pass",
}


class ClusterCheckout(Checkout):
    """A checkout whose runs go through --workflow-profile profiles/slurm."""

    def __init__(self, root: Path, cluster: Cluster) -> None:
        super().__init__(root)
        self.cluster = cluster
        for name, body in BODIES.items():
            text = METHOD.format(name=name, what=name, body=body)
            (root / "methods" / f"{name}.py").write_text(text)

    def suite(self, name: str, methods: Any, **changes: Any) -> str:
        """Write a suite of its own name, its base ready; returns the option that runs it."""
        changes = {"tuning": None, "limits": LIMITS} | changes
        path = self.write_suite(name, suite=name, methods=methods, **changes)
        ready = f"results/{name}/bases/tiny.json"
        if not (self.root / ready).exists():
            self.snakemake(ready, "--configfile", str(path))
        return f"--configfile={path}"

    def command(self, *arguments: str) -> list[str]:
        """Snakemake through the profile; it looks at jobs more often than on a real cluster."""
        profile = ["snakemake", "--workflow-profile", "profiles/slurm", "--latency-wait", "10"]
        profile += ["--slurm-init-seconds-before-status-checks", "2", "--jobs", "2"]
        return self.cluster.inside(*profile, *arguments, folder=self.root)

    def slurm(self, *arguments: str, code: int | None = 0) -> str:
        """A run through SLURM to its end; returns what it printed."""
        return self.run(*self.command(*arguments), code=code)

    def start(self, *arguments: str) -> Run:
        """Start a run through SLURM and come back."""
        return Run(self, arguments)

    def jobs(self, since: int, *fields: str) -> list[dict[str, str]]:
        """Submissions after a number, by sacct."""
        fields = ("ReqMem", "Timelimit", "AllocTRES", *fields)
        return [row for row in self.cluster.sacct(*fields) if _number(row["JobID"]) > since]

    def last_job(self) -> int:
        """Number of the last submission."""
        rows = self.cluster.sacct()
        return max((_number(row["JobID"]) for row in rows), default=0)


class Run:
    """A run of Snakemake in the background."""

    def __init__(self, home: ClusterCheckout, arguments: tuple[str, ...]) -> None:
        self.path = home.root / "background.log"
        with self.path.open("w") as log:
            self.process = subprocess.Popen(
                home.command(*arguments), cwd=home.root, env=home.environment,
                stdout=log, stderr=log,
            )  # fmt: skip

    @property
    def output(self) -> str:
        return self.path.read_text()

    def until(self, seen: Callable[[], Any], what: str, seconds: float = 600) -> Any:
        """Wait until something is seen, while the run goes on; returns it."""
        limit = time.monotonic() + seconds
        while not (found := seen()):
            assert time.monotonic() < limit, f"never seen: {what}\n{self.output}"
            assert self.process.poll() is None, f"ended before {what}\n{self.output}"
            time.sleep(0.2)
        return found

    def finish(self, code: int = 0, seconds: float = 900) -> str:
        """Wait for the end and its exit code; returns what was printed."""
        try:
            found = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"not finished after {seconds} s\n{self.output}") from None
        assert found == code, f"exit code {found}\n{self.output}"
        return self.output

    def kill(self) -> None:
        """SIGKILL to Snakemake itself; what it submitted lives on."""
        [child] = _children(self.process.pid)
        os.kill(child, signal.SIGKILL)
        self.process.wait()


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _number(job: str) -> int:
    return int(job.partition("_")[0].partition(".")[0])
