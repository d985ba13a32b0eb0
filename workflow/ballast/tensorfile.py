"""Tensors on disk: safetensors files that carry a checksum of their own content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ballast.errors import Damaged, DataError
from ballast.files import replacing


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    """Write tensors and JSON metadata atomically; returns the content's digest."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    digest, text = tensors_digest(tensors), json.dumps(about)
    with replacing(path) as temporary:
        save_file(
            tensors, temporary, {"about": text, "about_sha256": _sha256(text), "sha256": digest}
        )
    return digest


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_tensors(path: Path, expected: str | None = None) -> tuple[dict[str, Tensor], Any]:
    """Tensors and metadata of a file.

    Raises Damaged if the file is missing or truncated, its content does not fit its checksum, or
    the checksum is not the `expected` one of a record; DataError if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, FileNotFoundError) as error:
        raise Damaged(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    digest, text = tensors_digest(tensors), metadata.get("about", "")
    whole = digest == metadata.get("sha256") and _sha256(text) == metadata.get("about_sha256")
    if not whole or (expected is not None and digest != expected):
        raise Damaged(f"{path}: the content does not fit its checksum; it is damaged")
    return tensors, json.loads(text)
