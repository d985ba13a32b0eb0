"""Weights of a base read one by one from where it lies, by the names they have in the model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ballast.errors import DataError

MARKED = 64


def fingerprint(weight: Tensor) -> Tensor:
    """Some entries of a weight, evenly spread, on the CPU: enough to tell it from all others."""
    count = weight.numel()
    places = torch.arange(min(MARKED, count)) * count // min(MARKED, count)
    return weight.detach().flatten()[places.to(weight.device)].cpu()


class StoredWeights:
    """The safetensors of a base's folder, mapped and not read until a weight is asked for.

    A file may name a weight otherwise than the model (a prefix of an older version): it is found by
    the end of its name, and by its fingerprint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._files = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        self._found: dict[str, str] = {}

    def weight(self, name: str, mark: Tensor, like: Tensor) -> Tensor:
        """The weight called `name` in the model, of the kind and on the device of `like`.

        mark: its fingerprint in the untouched model. Raises DataError if no stored weight has it.
        """
        if name in self._found:
            return self._read(self._found[name], like)
        for key in sorted(self._files, key=lambda key: (-_shared(key, name), key)):
            if _shared(key, name) == 0 or self._shape(key) != list(like.shape):
                continue
            weight = self._read(key, like)
            if torch.equal(fingerprint(weight), mark):
                self._found[name] = key
                return weight
        raise DataError(
            f"{self.folder}: holds no weight that is {name} of the base that was loaded; give the "
            "folder from which it was"
        )

    def _read(self, key: str, like: Tensor) -> Tensor:
        return self._files[key].get_tensor(key).to(like.device, like.dtype)

    def _shape(self, key: str) -> list[int]:
        return list(self._files[key].get_slice(key).get_shape())


def _shared(left: str, right: str) -> int:
    """How many parts of two dotted names agree, from the end."""
    count = 0
    for a, b in zip(reversed(left.split(".")), reversed(right.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count
