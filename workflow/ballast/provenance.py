"""Where a record's numbers come from: versions, commit, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from ballast.devices import cells_per_gpu

PACKAGES = (
    "ballast", "torch", "transformers", "datasets", "evaluate", "lm-eval", "pandas", "snakemake",
    "numpy", "safetensors", "tokenizers", "scikit-learn",
)  # fmt: skip


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def provenance(root: Path, device: str) -> dict[str, Any]:
    """Package versions, git commit and whether the tree was dirty, interpreter, machine, device.

    A GPU is named by model and UUID; beside it stands how many cells were allowed to share it.
    """
    import torch

    changed = _git(root, "status", "--porcelain")
    gpu = torch.cuda.get_device_properties(device) if device.startswith("cuda") else None
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _git(root, "rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "device": gpu.name if gpu else device,
        "gpu": str(gpu.uuid) if gpu else None,
        "cells_per_gpu": cells_per_gpu() if gpu else None,
        "threads": torch.get_num_threads(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
