"""How many entries of a matrix a method works on at once.

A method file that goes through large matrices in parts names their size `CHUNK`: what suits the
cache of a CPU's core. On a GPU such parts are too small: a step would be tens of thousands of
kernel launches, each of which takes longer than its work.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

NAME = "CHUNK"
GPU_CHUNK = 2**24  # entries; 64 MiB in fp32


def fit_chunks(method: ModuleType, device: torch.device) -> None:
    """On a GPU, raise `CHUNK` of a loaded method file and of those beside it to GPU_CHUNK.

    It stays raised: the cells of a process run on one device.
    """
    if device.type != "cuda":
        return
    package = f"{method.__name__.rpartition('.')[0]}."
    beside = [module for name, module in sys.modules.items() if name.startswith(package)]
    for module in [method, *beside]:
        if hasattr(module, NAME):
            setattr(module, NAME, max(getattr(module, NAME), GPU_CHUNK))
