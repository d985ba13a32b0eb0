"""Whether two runs of a suite found the same: everything but times, memory and where they ran."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

# Of a record: what differs between two runs by nature, and the record's own checksum.
BY_NATURE = ("costs", "provenance", "checksum")


def found_by(suite: Path) -> dict[str, dict[str, Any]]:
    """What a run found: every record without costs, and the table's columns that tests made."""
    found = {}
    for path in sorted(suite.glob("cells/*/run.json")):
        record = json.loads(path.read_text())
        kept = {key: value for key, value in record.items() if key not in BY_NATURE}
        cell = record["identity"]
        name = ".".join(str(cell[key]) for key in ("base", "target", "method", "variant", "rank"))
        found[f"{name}.s{cell['seed']}"] = kept
    return found


def differences(first: Path, second: Path, ignored: Collection[str] = ()) -> list[str]:
    """Lines that name what two runs of a suite (their folders) found differently; none if equal.

    ignored: keys at any depth that do not count, beside what differs by nature.
    """
    lines: list[str] = []
    _compare(found_by(first), found_by(second), "", {*ignored}, lines)
    return lines


def _compare(one: Any, other: Any, where: str, ignored: set[str], lines: list[str]) -> None:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other} - ignored):
            if key not in one or key not in other:
                lines.append(f"{where}/{key}: only in {'one' if key in one else 'the other'}")
            else:
                _compare(one[key], other[key], f"{where}/{key}", ignored, lines)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            _compare(a, b, f"{where}/{place}", ignored, lines)
    elif one != other:
        lines.append(f"{where}: {one!r} != {other!r}")
