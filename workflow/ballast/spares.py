"""Spare copies of finished records and curves, for when Snakemake cleans up after a submission.

On a cluster several small cells share a submission. Where one of them fails, or SLURM kills it,
Snakemake removes what all of them declared, finished ones included, and runs all of them again. A
copy beside the file lets a job that finds it finished put it back, instead of scoring once more.
So does the record of a failure whose retries are spent: SLURM calls a job out of memory, and
Snakemake removes what it wrote, even where only the cell was killed and its supervisor ended well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ballast.errors import DataError
from ballast.files import replacing, sha256_file
from ballast.layout import Layout
from ballast.outcome import RECORD, adapters_of, cell_folder
from ballast.records import read_path, status_of

SPARE = ".spare"


def _copy(source: Path, target: Path) -> None:
    with replacing(target) as temporary:
        temporary.write_bytes(source.read_bytes())


def _spare(path: Path) -> Path:
    return path.with_name(f".{path.name}{SPARE}")


def keep(path: Path) -> None:
    """Keep a copy of a finished file beside it."""
    _copy(path, _spare(path))


def restore(path: Path) -> bool:
    """Put the copy of a file in its place; False if there is none."""
    if not _spare(path).exists():
        return False
    _copy(_spare(path), path)
    return True


def keep_record(row: dict[str, Any], layout: Layout) -> None:
    """Keep a copy of the record of a plan's row."""
    keep(cell_folder(row, layout) / RECORD)


def restore_record(row: dict[str, Any], layout: Layout) -> bool:
    """Put the copy of a record back if it is current and all that it names is there, unchanged."""
    folder = cell_folder(row, layout)
    try:
        record = read_path(_spare(folder / RECORD))
    except DataError:
        return False
    status = status_of(row, record)
    if status == "ok":
        parents = adapters_of(json.loads(row["spec"]), layout)
        # One that an earlier version wrote does not say of which weights of its parents it is.
        if record["provenance"].get("parents", {}) != parents or not _complete(record, folder):
            return False
    return status in ("ok", "failed") and restore(folder / RECORD)


def drop_spares(home: Path) -> None:
    """Remove the copies of what is there: a run that makes it again has a reason.

    home: the suite's folder. Called when a run starts; what its groups lose is kept from then on.
    """
    for folder in ("cells/*", "tune/cells/*", "curves"):
        for spare in home.glob(f"{folder}/.*{SPARE}"):
            if spare.with_name(spare.name.removeprefix(".").removesuffix(SPARE)).exists():
                spare.unlink(missing_ok=True)


def drop_spare(path: Path) -> None:
    """Remove the copy of a file, if there is one."""
    _spare(path).unlink(missing_ok=True)


def _complete(record: dict[str, Any], folder: Path) -> bool:
    """Whether a record's files are there and, where it holds their SHA-256, have these bytes."""
    for name, digest in record["files"].items():
        path = folder / name
        # An adapter's digest is of its tensors; whoever loads it checks it.
        if not path.exists() or (path.suffix != ".safetensors" and sha256_file(path) != digest):
            return False
    return True
