"""What a machine can do: cores, GPUs, memory, free disk, and how fast it computes."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from ballast.driver import nvidia_smi
from ballast.errors import SuiteError

# Peak FLOP/s of dense matrix products by a part of the GPU's name: (bf16 or fp16, fp32), and bytes
# per second of its memory. From the makers' data sheets; the first part that fits counts.
GPUS: dict[str, tuple[float, float, float]] = {
    "B200": (2.25e15, 7.5e13, 8.0e12),
    "H200": (9.9e14, 6.7e13, 4.8e12),
    "H100": (9.9e14, 6.7e13, 3.35e12),
    "A100": (3.12e14, 1.95e13, 2.0e12),
    "L40": (3.62e14, 9.1e13, 8.6e11),
    "A40": (1.5e14, 3.7e13, 7.0e11),
    "A10": (1.25e14, 3.1e13, 6.0e11),
    "V100": (1.25e14, 1.57e13, 9.0e11),
    "T4": (6.5e13, 8.1e12, 3.2e11),
    "4090": (1.65e14, 8.3e13, 1.0e12),
    "3090": (7.1e13, 3.6e13, 9.4e11),
}
# A GPU that is not known, or not there: as an A100, which many clusters have.
COMMON_GPU = GPUS["A100"]
# Share of the peak that training of a large model reaches; and of a small step's own time.
SHARE = 0.35
# FLOP/s of one core in fp32, as small matrices reach them; bf16 is no faster without AMX.
CORE_FLOPS = 2.5e10
UNITS = {"": 1.0, "K": 1e-3, "KB": 1e-3, "M": 1.0, "MB": 1.0, "G": 1e3, "GB": 1e3, "T": 1e6,
         "TB": 1e6, "MIB": 1.048576, "GIB": 1073.741824}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """A machine to plan for. Memory in MB; `gpu_memory_mb` of one GPU, None where there is none."""

    cores: int
    gpus: int
    memory_mb: float
    gpu_memory_mb: float | None
    gpu_name: str
    disk_free_mb: float

    def rate(self, gpu: bool, precision: str, threads: int = 1) -> float:
        """FLOP/s of a cell on a GPU, or on its threads."""
        if not gpu:
            return CORE_FLOPS * threads
        half, single, _ = self._gpu
        return SHARE * (half if precision == "bf16" else single)

    @property
    def gpu_bytes(self) -> float:
        """Bytes per second that a GPU reads of its memory."""
        return self._gpu[2]

    @property
    def _gpu(self) -> tuple[float, float, float]:
        return next((v for k, v in GPUS.items() if k in self.gpu_name), COMMON_GPU)


def this_machine(place: Path = Path()) -> Machine:
    """The machine that this runs on; `place` lies on the disk that counts."""
    names = _gpus()
    while not place.exists():
        place = place.parent
    return Machine(
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        gpus=len(names),
        memory_mb=psutil.virtual_memory().total / 1e6,
        gpu_memory_mb=min((memory for _, memory in names), default=None),
        gpu_name=names[0][0] if names else "",
        disk_free_mb=shutil.disk_usage(place).free / 1e6,
    )


def parse_memory(text: str) -> float:
    """MB of "24GB", "80 GiB" or "4000" (MB). Raises SuiteError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in UNITS or float(found[1]) <= 0:
        raise SuiteError(f"{text!r} is no amount of memory; write 24GB, 80GiB or 4000 (MB)")
    return float(found[1]) * UNITS[found[2].upper()]


def _gpus() -> list[tuple[str, float]]:
    """Name and memory (MB) of the GPUs that the driver lists and this process may see."""
    listed = nvidia_smi("--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
    rows = [[part.strip() for part in line.split(",")] for line in (listed or "").splitlines()]
    rows = [row for row in rows if len(row) == 4 and row[3].replace(".", "").isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        wanted = {word.strip() for word in visible.split(",")}
        rows = [row for row in rows if row[0] in wanted or row[1] in wanted]
    return [(row[2], float(row[3]) * 1.048576) for row in rows]
