"""Where things lie: the one place that knows the names of folders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ballast.errors import DataError

LONGEST = 220  # bytes of a name; disks take 255, and temporary files have longer ones


@dataclass(frozen=True)
class Layout:
    """A checkout (`root`, with methods/ and workflow/) and the folder that runs write to."""

    root: Path
    results: Path

    @classmethod
    def here(cls) -> Layout:
        """The checkout that this library comes from; results under the working directory."""
        return cls(Path(__file__).resolve().parents[2], Path("results"))

    @property
    def methods(self) -> Path:
        return self.root / "methods"

    @property
    def tasks(self) -> Path:
        return self.root / "workflow" / "tasks"

    def schema(self, name: str) -> Path:
        return self.root / "workflow" / "schemas" / f"{name}.schema.yaml"

    def suite(self, name: str) -> Path:
        # The cells of `tune` have a folder below the suite's: SUITE/tune.
        return self.results.joinpath(*map(plain, name.split("/")))

    def cell(self, suite: str, cell: str) -> Path:
        return self.suite(suite) / "cells" / plain(cell)

    def curve(self, suite: str, cell: str, kind: str) -> Path:
        return self.suite(suite) / "curves" / plain(f"{cell}.{kind}.json")

    def plan(self, suite: str, key: str) -> Path:
        return self.suite(suite) / "plan" / plain(f"{key}.parquet")

    @property
    def shared(self) -> Path:
        return self.results / "shared"

    def base(self, base: str, key: str) -> Path:
        return self.shared / "bases" / plain(f"{base}-{key}")

    def data(self, base: str, base_key: str, task: str, key: str) -> Path:
        return self.shared / "data" / plain(f"{base}-{base_key}") / plain(f"{task}-{key}")

    def scores(self, base: str, base_key: str, task: str, key: str) -> Path:
        return self.shared / "scores" / plain(f"{base}-{base_key}") / plain(f"{task}-{key}")

    def decompositions(self, base: str, base_key: str) -> Path:
        return self.shared / "decompositions" / plain(f"{base}-{base_key}")


def plain(name: str) -> str:
    """The name, if it is one of a file and no path.

    Raises DataError for a name that could lead out of its folder or that a disk would not take.
    """
    if name in ("", ".", "..") or not name.isprintable() or {"/", "\\"} & set(name):
        raise DataError(f"{name!r:.100} cannot be the name of a file: no '/', no '..', no controls")
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise DataError(f"{name!r:.100} cannot be the name of a file: it is no Unicode") from None
    if size > LONGEST:
        raise DataError(f"{name!r:.100} is too long for the name of a file, {size} bytes")
    return name


def real_data(relative: str) -> Path:
    """A file or folder of the real data that the environment variable BALLAST_DATA names.

    `relative` may start with $BALLAST_DATA/; an absolute path is taken as it is.
    Raises DataError that says what to set.
    """
    relative = relative.removeprefix("$BALLAST_DATA/")
    if Path(relative).is_absolute():
        path = Path(relative)
    else:
        folder = os.environ.get("BALLAST_DATA")
        if not folder:
            raise DataError(
                f"{relative}: real data is needed; set the environment variable BALLAST_DATA to "
                "the folder that holds it (README, 'Real data')"
            )
        path = Path(folder) / relative
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; is BALLAST_DATA right?")
    return path
