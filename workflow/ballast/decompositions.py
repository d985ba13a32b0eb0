"""Singular value decompositions of base weights, made once per base and shared by its cells."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ballast.errors import Damaged, DataError
from ballast.files import set_aside
from ballast.locks import held
from ballast.tensorfile import read_tensors, write_tensors

# Multiply-adds of a decomposition that takes a core a tenth of a second: cheaper ones are computed
# by every process that wants them, as a small base has hundreds, each done before a lock is taken.
SHARED = 1e8
# Seconds after which a process no longer waits for another's: that one may be stopped, not dead.
PATIENCE = 1200.0

Parts = tuple[Tensor, Tensor, Tensor]  # U, S, Vh


class Decompositions:
    """SVDs keyed by the weight's own bytes, so that a stale one cannot be met.

    folder: where they are kept; None computes each time (tests, notebooks).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def svd(self, weight: Tensor) -> Parts:
        """U [m, k], S [k], Vh [k, n] of `weight` [m, n], k = min(m, n), singular values descending.

        Computed in float64 for float64 weights, else in float32, on the CPU. A stored one that is
        damaged, or another weight's, is set aside and computed again. What takes long is computed
        by one process at a time; others that want it wait, and read it.
        """
        matrix = weight.detach().cpu()
        matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
        if self.folder is None:
            return torch.linalg.svd(matrix, full_matrices=False)
        name = hashlib.sha256(matrix.contiguous().numpy().tobytes()).hexdigest()[:24]
        path = self.folder / f"{name}-{matrix.shape[0]}x{matrix.shape[1]}.safetensors"
        found = _stored(path, name, matrix)
        if found is not None:
            return found
        rows, columns = matrix.shape
        if rows * columns * min(rows, columns) < SHARED:
            return _made(path, name, matrix)
        with _alone(path):
            return _stored(path, name, matrix) or _made(path, name, matrix)


def _made(path: Path, name: str, matrix: Tensor) -> Parts:
    """Compute a decomposition and store it."""
    u, s, vh = (part.contiguous() for part in torch.linalg.svd(matrix, full_matrices=False))
    write_tensors(path, {"u": u, "s": s, "vh": vh}, {"of": name})
    return u, s, vh


def _stored(path: Path, name: str, matrix: Tensor) -> Parts | None:
    """The stored decomposition; None if there is none, or a damaged one, which is set aside."""
    if not path.exists():
        return None
    try:
        return _read(path, name, matrix)
    except Damaged as error:
        set_aside(path)
        print(f"{error}; set aside, computed again", file=sys.stderr)
        return None


class _GivenUp(Exception):
    """The wait for another process was too long."""


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let the block run in one process at a time; the others wait, at most PATIENCE seconds.

    Nothing else is waited for inside, so that no two processes can wait for one another.
    """
    lock, latest = path.with_name(f".{path.stem}.lock"), time.monotonic() + PATIENCE

    def check() -> None:
        if time.monotonic() > latest:
            raise _GivenUp

    with ExitStack() as stack:
        with suppress(_GivenUp):
            label = f"decompositions of {path.parent.name}"
            stack.enter_context(held(path.parent, label, _once(path.parent), check, lock.name))
            # While it is held: whoever waits for it finds that it is gone, and takes a new one.
            stack.callback(_removed, lock)
        yield


def _removed(lock: Path) -> None:
    with suppress(OSError):  # another user's, in a folder that several share
        lock.unlink()


_told: set[Path] = set()


def _once(folder: Path) -> Callable[[str], None]:
    """Says the first of all lines about a folder: its hundreds of matrices are waited for alike."""

    def say(line: str) -> None:
        if folder not in _told:
            _told.add(folder)
            print(line, file=sys.stderr, flush=True)

    return say


def _read(path: Path, name: str, matrix: Tensor) -> Parts:
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
