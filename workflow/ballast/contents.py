"""Contents of the files that a hyper-parameter names: a cell is known by them, not by a path."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ballast.errors import DataError, MethodError
from ballast.layout import real_data

DATA = "$BALLAST_DATA"


def content_of(
    where: str, value: Any, files: Sequence[str], folders: Sequence[Path]
) -> dict[str, Any]:
    """Contents of JSON files by their names without `.json`.

    value: the contents themselves (of the first of `files`, or of several by name), or the path of
    one such file or of a folder that holds them; the first of `files` must be there.
    folders: where a relative path may start. Raises MethodError that starts with `where`.
    """
    names = [Path(file).stem for file in files]
    if isinstance(value, dict):
        return value if value and set(value) <= set(names) else {names[0]: value}
    if not isinstance(value, str):
        raise MethodError(f"{where}: {value!r}; a mapping, or the path of {files[0]}, is needed")
    path = find(value, folders)
    if path is None:
        places = ", ".join(str(folder) for folder in folders) or "no folder"
        raise MethodError(f"{where}: no file or folder {value!r} (searched: {places})")
    if path.is_file():
        return {names[0]: _read(where, path)}
    if not (path / files[0]).is_file():
        raise MethodError(f"{where}: {path} holds no {files[0]}")
    return {Path(file).stem: _read(where, path / file) for file in files if (path / file).is_file()}


def find(text: str, folders: Sequence[Path]) -> Path | None:
    """An existing file or folder: in $BALLAST_DATA where the text starts so, else in `folders`."""
    if text.startswith(DATA):
        try:
            return real_data(text)
        except DataError:
            return None
    found = [Path(text)] if Path(text).is_absolute() else [folder / text for folder in folders]
    return next((path for path in found if path.exists()), None)


def named_files(config: dict[str, Any], folders: Sequence[Path]) -> Iterator[Path]:
    """JSON files that the methods' settings of a suite may name, for the key of its plan."""
    methods = config.get("methods")
    for spec in methods.values() if isinstance(methods, dict) else ():
        for item in (spec, *spec.get("variants", {}).values()):
            for value in item.get("set", {}).values():
                path = find(value, folders) if isinstance(value, str) and value else None
                if path is not None and path.is_dir():
                    yield from sorted(path.glob("*.json"))
                elif path is not None and path.suffix == ".json":
                    yield path


def _read(where: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise MethodError(f"{where}: {path}: {error}") from None
