"""Trials of one stage: killed at a random moment, perhaps again, run to its end, and compared."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ballast.files import read_json, read_sealed

HERE = Path(__file__).resolve().parent
# Of records and of what stands in other files: times, and what a run was continued from.
TIMES = {
    "seconds", "first_step_seconds", "step_ms", "memory_mb", "resumed_from", "time", "times",
    "adapter_bytes",  # of the file, in whose header times stand
    "checksum",  # of all of these
}  # fmt: skip


class Warm:
    """A warm process (`warm.py`) for the checkout at `root`."""

    def __init__(self, root: Path, log: Path, **environment: str) -> None:
        self.log = log
        paths = [str(root / "workflow"), str(HERE)]
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "warm.py"), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.with_suffix(".warm").open("w"),
            text=True,
            cwd=root,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
            | environment,
        )
        assert self.process.stdout.readline() == "ready\n", log.with_suffix(".warm").read_text()

    def run(self, folder: Path, stage: str, *arguments: str, kill: Any = None) -> dict[str, Any]:
        """Do a stage in a folder, killed as `kill` says; how it ended."""
        request = {
            "folder": str(folder),
            "stage": stage,
            "arguments": arguments,
            "kill": kill,
            "log": str(self.log),
        }
        self.log.unlink(missing_ok=True)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def finish(self, folder: Path, stage: str, *arguments: str) -> dict[str, Any]:
        """Do a stage undisturbed; fails unless it ends well."""
        done = self.run(folder, stage, *arguments)
        assert done["code"] == 0, f"{stage} {arguments}: {done}\n{self.log.read_text()}"
        return done

    def trace(self) -> dict[str, Any]:
        """Seconds and operations of the stage that was finished last."""
        return read_json(Path(f"{self.log}.trace"))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def without_times(value: Any) -> Any:
    """JSON without what may differ between two runs."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIMES}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def content(path: Path) -> Any:
    """What a file says, times apart; its bytes where it says none."""
    if path.suffix == ".json":
        value = read_json(path)
        return without_times(read_sealed(path) if isinstance(value, dict) else value)
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as stored:
            header = dict(stored.metadata() or {})
            about = without_times(json.loads(header.pop("about", "{}")))
            header.pop("about_sha256", None)
            tensors = [
                (name, hashlib.sha256(stored.get_tensor(name).numpy().tobytes()).hexdigest())
                for name in stored.keys()  # noqa: SIM118
            ]
        return [about, header, tensors]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tree(folder: Path) -> dict[str, Any]:
    """Contents of all files of a folder by name; locks are empty of meaning."""
    return {
        str(path.relative_to(folder)): content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".lock")
    }


@dataclass
class Stage:
    """A stage to be killed in: what it is called, what it does, and where in it.

    files: part of the path of the operations at which it is killed ("": at any); window: between
    which shares of its time it is killed otherwise.
    """

    name: str
    work: tuple[str, ...]
    state: Path
    files: tuple[str, ...] = ("",)
    window: tuple[float, float] = (0.0, 1.0)
    again: tuple[tuple[str, ...], ...] = ()  # what follows it in the rerun
    seconds: float = 0.0
    operations: list[tuple[int, str]] = field(default_factory=list)
    expected: dict[str, Any] = field(default_factory=dict)

    def measure(self, warm: Warm, place: Path) -> None:
        """Run it undisturbed: its operations, how long it takes, and what it leaves."""
        folder = self.fresh(place)
        warm.finish(folder, *self.work)
        trace = warm.trace()
        self.seconds = trace["seconds"]
        self.operations = [
            (k, f"{event} {path}")
            for k, (_, event, path) in enumerate(trace["operations"], 1)
            if any(part in path for part in self.files)
        ]
        assert self.operations, f"{self.name}: no operation on {self.files}"
        self.expected = tree(folder)
        shutil.rmtree(folder)

    def fresh(self, place: Path) -> Path:
        """A copy of the state that the stage starts from."""
        folder = place / "trial"
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(self.state, folder)
        return folder

    def moment(self, draw: random.Random) -> dict[str, Any]:
        """When to kill: two times of three at an operation, else at a time."""
        if draw.random() < 2 / 3:
            return {
                "operation": draw.choice(self.operations)[0],
                "when": draw.choice(["before", "after"]),
            }
        low, high = self.window
        return {"seconds": self.seconds * draw.uniform(low, high)}


def trial(stage: Stage, seed: int, warm: Warm, place: Path, counts: Counter[str]) -> None:
    """One trial. Fails if the rerun does not end well or leaves anything else than expected."""
    draw = random.Random(f"{stage.name} {seed}")
    folder = stage.fresh(place)
    kills: list[Any] = []
    for _ in range(draw.choice([1, 1, 2, 3])):
        kill = stage.moment(draw)
        done = warm.run(folder, *stage.work, kill=kill)
        assert done["code"] in (0, -9), f"{stage.name}, seed {seed}: {done}\n{warm.log.read_text()}"
        assert not done["late"], f"{stage.name}, seed {seed}: never ended"
        if done["code"] == -9:
            kills.append((kill, done["last"]))
    about = f"{stage.name}, seed {seed}, killed at {kills}"
    done = warm.run(folder, *stage.work)
    assert done["code"] == 0, f"{about}: {done}\n{warm.log.read_text()}"
    found = tree(folder)
    assert not [name for name in found if ".part" in name], f"{about}: litter"
    assert set(found) == set(stage.expected), about
    wrong = [name for name, value in stage.expected.items() if found[name] != value]
    assert not wrong, f"{about}: {wrong} differ"
    print(about)
    counts[f"{stage.name}: trials"] += bool(kills)
    counts[f"{stage.name}: kills"] += len(kills)
