"""Singular value decompositions of base weights, made once per base and shared by its cells."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ballast.errors import Damaged, DataError
from ballast.files import set_aside
from ballast.tensorfile import read_tensors, write_tensors


class Decompositions:
    """SVDs keyed by the weight's own bytes, so that a stale one cannot be met.

    folder: where they are kept; None computes each time (tests, notebooks).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def svd(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U [m, k], S [k], Vh [k, n] of `weight` [m, n], k = min(m, n), singular values descending.

        Computed in float64 for float64 weights, else in float32, on the CPU. A stored one that is
        damaged, or another weight's, is set aside and computed again.
        """
        matrix = weight.detach().cpu()
        matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
        if self.folder is None:
            return torch.linalg.svd(matrix, full_matrices=False)
        name = hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest()[:24]
        path = self.folder / f"{name}-{matrix.shape[0]}x{matrix.shape[1]}.safetensors"
        if path.exists():
            try:
                return _read(path, name, matrix)
            except Damaged as error:
                set_aside(path)
                print(f"{error}; set aside, computed again", file=sys.stderr)
        u, s, vh = (part.contiguous() for part in torch.linalg.svd(matrix, full_matrices=False))
        write_tensors(path, {"u": u, "s": s, "vh": vh}, {"of": name})
        return u, s, vh


def _read(path: Path, name: str, matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A stored decomposition. Raises Damaged if it is not that of the matrix."""
    try:
        with safe_open(path, framework="pt") as stored:
            sealed = "sha256" in (stored.metadata() or {})
            # Of earlier versions: no checksum, so that the product has to tell.
            found = {} if sealed else {key: stored.get_tensor(key) for key in ("u", "s", "vh")}
    except SafetensorError as error:
        raise Damaged(f"{path}: cannot be read: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if sealed:
        found, about = read_tensors(path)
        if about != {"of": name}:
            raise Damaged(f"{path}: holds the decomposition of another weight")
    else:
        try:
            error = torch.linalg.vector_norm(found["u"] * found["s"] @ found["vh"] - matrix)
        except RuntimeError:
            error = torch.tensor(torch.inf)
        if not error <= 1e-3 * torch.linalg.vector_norm(matrix):
            raise Damaged(f"{path}: not the decomposition of its weight")
    return found["u"], found["s"], found["vh"]
