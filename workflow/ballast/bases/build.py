"""Making a base ready: pretrain, download, import or point at it."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ballast.errors import DataError
from ballast.files import read_json, sha256_file, write_json
from ballast.layout import real_data

READY = "base.json"
Report = Callable[[str], None]


def make_base(spec: dict[str, Any], folder: Path, report: Report) -> dict[str, Any]:
    """Make the base in `folder` unless it is there; returns {"model", "files", "seconds", ...}.

    `model` is a transformers folder; `files` has the SHA-256 of its weights and settings.
    Raises DataError for a source that cannot be reached or is not safetensors.
    """
    if (folder / READY).exists():
        return read_json(folder / READY)
    started = time.perf_counter()
    source = spec["source"]
    model = folder / "model"
    if "path" in source:
        model = real_data(source["path"]).resolve()
    else:
        part = folder / "model.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _fill(source, part, report)
        shutil.rmtree(model, ignore_errors=True)
        part.replace(model)
    if not model.is_dir():
        raise DataError(f"{model}: is not a folder; a transformers folder is expected")
    names = sorted(p for p in model.iterdir() if p.suffix in (".safetensors", ".json", ".jinja"))
    if not any(p.suffix == ".safetensors" for p in names):
        raise DataError(f"{model}: no .safetensors file; other formats of weights are not read")
    made = {
        "model": str(model),
        "source": source,
        "files": {p.name: sha256_file(p) for p in names},
        "seconds": time.perf_counter() - started,
    }
    write_json(folder / READY, made)
    return made


def _fill(source: dict[str, Any], folder: Path, report: Report) -> None:
    if source.get("world") == "micro-lm":
        from ballast.bases import micro_lm

        micro_lm.pretrain(folder, source.get("seed", 0), report)
    elif source.get("world") == "micro-vlm":
        from ballast.bases import micro_vlm

        micro_vlm.pretrain(folder, source.get("seed", 0), report)
    elif source.get("world") == "micro-encoder":
        from ballast.bases import micro_encoder

        micro_encoder.pretrain(folder, source.get("seed", 0), report)
    elif "llama2c" in source:
        from ballast.bases import llama2c

        fetch = functools.partial(_fetch, source) if "hub" in source else real_data
        files = source["llama2c"]
        llama2c.convert(fetch(files["model"]), fetch(files["tokenizer"]), folder)
    else:
        _download(source, folder, report)


def _fetch(source: dict[str, Any], name: str) -> Path:
    """One file of a repository of the hub, at its revision."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source["hub"], name, revision=source.get("revision")))
    except Exception as error:  # as in _download
        raise _unreachable(f"{source['hub']}/{name}", error) from None


def _unreachable(what: str, error: Exception) -> DataError:
    return DataError(
        f"{what}: cannot be downloaded ({type(error).__name__}: {error}); without the hub, give "
        "the base a `path:` to a local transformers folder"
    )


def _download(source: dict[str, Any], folder: Path, report: Report) -> None:
    """Fetch a model of the hub at its revision: weights as safetensors, settings, tokenizer."""
    from huggingface_hub import snapshot_download

    report(f"downloading {source['hub']} at {source.get('revision', 'main')}")
    try:
        snapshot_download(
            source["hub"],
            revision=source.get("revision"),
            local_dir=folder,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
        )
    except Exception as error:  # the hub's own errors, its HTTP client's, and the system's
        raise _unreachable(source["hub"], error) from None
    shutil.rmtree(folder / ".cache", ignore_errors=True)
