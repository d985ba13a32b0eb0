"""Making a base ready: pretrain, download, import or point at it."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ballast.errors import Damaged, DataError
from ballast.faults import fault_of
from ballast.files import read_sealed, set_aside, sha256_file, write_sealed, wrong_files
from ballast.hub import way_out
from ballast.layout import real_data

READY = "base.json"
WEIGHTS = ".safetensors"
# Files of a model's folder that make it what it is; of these some are read without being named.
READ = (WEIGHTS, ".json", ".jinja", ".model", ".txt")
UNNAMED = READ[:3]
Report = Callable[[str], None]


def make_base(spec: dict[str, Any], folder: Path, report: Report) -> dict[str, Any]:
    """Make the base in `folder` unless it is there; returns {"model", "files", "seconds", ...}.

    `model` is a transformers folder; `files` has the SHA-256 of its weights and settings; `commit`
    is the hub's, where it comes from there. A base whose files are damaged is made again, from the
    same commit, and must become the same.
    Raises DataError for a source that cannot be reached or is not safetensors, for a user's own
    folder that has changed, and for a base that was made again and is another one.
    """
    before = _stored(folder / READY, spec["source"], report)
    if before is not None:
        changed = changed_files(before)
        if not changed:
            return before
        name, problem = next(iter(changed.items()))
        if "path" in before["source"]:
            raise DataError(changed_text(before, changed))
        report(f"{before['model']}/{name}: {problem}; the base is made again")
    started = time.perf_counter()
    source = spec["source"]
    model = folder / "model"
    commit = before.get("commit") if before else None
    if "path" in source:
        model = real_data(source["path"]).resolve()
    else:
        part = folder / "model.part"
        if "hub" not in source or "llama2c" in source:
            shutil.rmtree(part, ignore_errors=True)
        # A download that was killed goes on with the files that it lacks.
        part.mkdir(parents=True, exist_ok=True)
        commit = _fill(source | ({"revision": commit} if commit else {}), part, report) or commit
        if before is not None:
            _check_same(before, part)
        shutil.rmtree(model, ignore_errors=True)
        part.replace(model)
    if not model.is_dir():
        raise DataError(f"{model}: is not a folder; a transformers folder is expected")
    names = sorted(p for p in model.iterdir() if p.suffix in READ)
    if not any(p.suffix == WEIGHTS for p in names):
        raise DataError(f"{model}: no .safetensors file; other formats of weights are not read")
    made = {
        "model": str(model),
        "source": source,
        **({"commit": commit} if commit else {}),
        "files": {p.name: sha256_file(p) for p in names},
        "seconds": time.perf_counter() - started,
    }
    write_sealed(folder / READY, made)
    return made


def _stored(path: Path, source: dict[str, Any], report: Report) -> dict[str, Any] | None:
    """What an earlier run noted of the base; a damaged or another base's note is set aside."""
    if not path.exists():
        return None
    try:
        made = read_sealed(path)
        if made["source"] != source:
            raise Damaged(f"{path}: holds another base")
        return made
    except Damaged as error:
        set_aside(path)
        report(f"{error}; set aside, the base is made again")
        return None


def changed_files(made: dict[str, Any]) -> dict[str, str]:
    """What is wrong by file, where a base's folder is not as it was when it was made ready.

    A file that has come since counts too, if transformers would read it by itself.
    """
    model, files = Path(made["model"]), made["files"]
    if not model.is_dir():
        return {"": "missing"}
    new = {p.name for p in model.iterdir() if p.suffix in UNNAMED} - set(files)
    return wrong_files(model, files) | dict.fromkeys(sorted(new), "is new")


@functools.cache
def _changed_once(model: str, files: tuple[tuple[str, str], ...], _: Any) -> dict[str, str]:
    return changed_files({"model": model, "files": dict(files)})


def check_unchanged(ready: dict[str, Any], set_damaged_aside: bool = False) -> None:
    """Raise DataError if a ready base's files are not as they were; read once while unchanged.

    ready: what `make_base` or `ready.make_ready` returned. A damaged file of a base that was made
    here is set aside, so that the next run makes the base again; a user's own folder is left alone.
    """
    model = Path(ready["model"])
    if not model.is_dir():
        raise DataError(changed_text(ready, {"": "missing"}))
    stats = [(path.name, path.stat()) for path in sorted(model.iterdir())]
    stamp = tuple((name, s.st_size, s.st_mtime_ns) for name, s in stats)
    changed = _changed_once(str(model), tuple(ready["files"].items()), stamp)
    if not changed:
        return
    text = changed_text(ready, changed)
    if set_damaged_aside and "path" not in ready.get("source", {"path": ""}):
        for name in changed:
            set_aside(model / name)
        text += "; set aside as *.damaged, and the next run makes the base again"
    raise DataError(text)


def changed_text(made: dict[str, Any], changed: dict[str, str]) -> str:
    """One line about a base that is no longer the one of its cells, and what to do."""
    name, problem = next(iter(changed.items()))
    where = Path(made["model"]) / name
    problem = problem.replace("damaged: the content does not", "changed: the content does not")
    more = f" ({len(changed)} files in all)" if len(changed) > 1 else ""
    if "path" in made.get("source", {"path": ""}):
        return (
            f"{where}: {problem}{more}; the base changed since it was made ready: put the old file "
            "back, or give the changed base a folder of its own"
        )
    return f"{where}: {problem}{more}"


def _check_same(before: dict[str, Any], folder: Path) -> None:
    """Refuse a base that was made again with other weights: its finished cells would not fit."""
    for name, digest in before["files"].items():
        if name.endswith(WEIGHTS) and not (
            (folder / name).is_file() and sha256_file(folder / name) == digest
        ):
            raise DataError(
                f"{before['model']}: its weights are damaged, and made again {name} is another "
                "file (another machine, or a changed source); put the old file back, or remove "
                f"{Path(before['model']).parent} and the cells of this base"
            )


def _fill(source: dict[str, Any], folder: Path, report: Report) -> str | None:
    """Make the transformers folder; returns the hub's commit, where it comes from there."""
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
        return _download(source, folder, report)
    return None


def _fetch(source: dict[str, Any], name: str) -> Path:
    """One file of a repository of the hub, at its revision."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source["hub"], name, revision=source.get("revision")))
    except Exception as error:  # as in _download
        raise _unreachable(f"{source['hub']}/{name}", error) from None


def _unreachable(what: str, error: Exception) -> DataError:
    return DataError(
        f"{what}: cannot be downloaded ({type(error).__name__}: {error}); {way_out(error)}"
    )


def _download(source: dict[str, Any], folder: Path, report: Report) -> str | None:
    """Fetch a model of the hub at its revision: weights as safetensors, settings, tokenizer.

    Returns the commit that the revision stood for, as the downloader noted it beside the files.
    """
    report(f"downloading {source['hub']} at {source.get('revision', 'main')}")
    commits = _fetched(source, folder)
    if len(commits) > 1:
        # The revision has moved on since a download was killed here: nothing of both is kept.
        shutil.rmtree(folder)
        folder.mkdir()
        commits = _fetched(source, folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return commits.pop() if len(commits) == 1 else None


def _fetched(source: dict[str, Any], folder: Path) -> set[str]:
    """Fetch what `folder` lacks of a model; returns the commits that its files are of."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            source["hub"],
            revision=source.get("revision"),
            local_dir=folder,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
        )
    except Exception as error:  # the hub's own errors, its HTTP client's, and the system's
        if fault_of(error) is not None:
            raise
        raise _unreachable(source["hub"], error) from None
    notes = sorted((folder / ".cache/huggingface/download").glob("*.metadata"))
    return {note.read_text(encoding="utf-8").partition("\n")[0].strip() for note in notes}
