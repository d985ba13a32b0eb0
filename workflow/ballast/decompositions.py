"""Singular value decompositions of base weights, made once per base and shared by its cells."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ballast.files import replacing


class Decompositions:
    """SVDs keyed by the weight's own bytes, so that a stale one cannot be met.

    folder: where they are kept; None computes each time (tests, notebooks).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def svd(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U [m, k], S [k], Vh [k, n] of `weight` [m, n], k = min(m, n), singular values descending.

        Computed in float64 for float64 weights, else in float32, on the CPU.
        """
        matrix = weight.detach().cpu()
        matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
        if self.folder is None:
            return torch.linalg.svd(matrix, full_matrices=False)
        name = hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest()[:24]
        path = self.folder / f"{name}-{matrix.shape[0]}x{matrix.shape[1]}.safetensors"
        if not path.exists():
            u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            with replacing(path) as temporary:
                tensors = {"u": u.contiguous(), "s": s, "vh": vh.contiguous()}
                save_file(tensors, temporary)
        stored = load_file(path)
        return stored["u"], stored["s"], stored["vh"]
