"""A page for each cell: what it was, what it cost, what it gained and lost, and where from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ballast.errors import DataError
from ballast.files import key_of
from ballast.records import beside
from ballast.results import Record, Results
from ballast.site import facts
from ballast.site.extras import CURVE, read_losses, thinned
from ballast.site.sparkline import sparkline
from ballast.site.templates import asset, environment

VERSION = 1
CHANGES = "changes.json"
_DIGEST = re.compile(r'<meta name="digest" content="([0-9a-f]+)">')
_HEAD = 400  # characters in which the digest of a page stands


def cell_pages(results: Results, folder: Path) -> dict[str, Path]:
    """Write the page of every cell that has a record; returns their paths by cell.

    A page whose digest is the one of what it would show is left untouched; others of the folder's
    pages are removed.
    """
    shown = results.table[["id", "status", "reason"]].fillna("").itertuples(index=False)
    states = {cell: (status, reason) for cell, status, reason in shown}
    folder.mkdir(parents=True, exist_ok=True)
    old = {path.name for path in folder.glob("*.html")}
    found: dict[str, Path] = {}
    for cell, record in results.records.items():
        if cell in states:
            found[cell] = folder / page_name(cell)
            _write(found[cell], record, states[cell], _beside(results.folder, record))
    for name in old - {path.name for path in found.values()}:
        (folder / name).unlink()
    return found


def page_name(cell: str) -> str:
    """File name of a cell's page: its id, or a safe name with a hash for other characters."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", cell) and len(cell) < 200:
        return f"{cell}.html"
    safe = re.sub(r"[^A-Za-z0-9.-]+", "-", cell).strip(".-")[:100] or "cell"
    return f"{safe}-{key_of(cell)}.html"


def _beside(folder: Path | None, record: Record) -> dict[str, str]:
    """Texts of the files beside a record that its page shows."""
    found = {}
    for name in (CHANGES, CURVE) if folder is not None else ():
        try:
            path = beside(folder / "cells" / record["id"], record, name)
            if path is not None:
                found[name] = path.read_text(encoding="utf-8")
        except (DataError, OSError, ValueError):  # an unfinished or damaged cell: without it
            continue
    return found


def _write(path: Path, record: Record, state: tuple[str, str], texts: Mapping[str, str]) -> None:
    digest = key_of(VERSION, _assets(), record, state, texts, length=32)
    if _digest_of(path) != digest:
        _put(path, render_cell(record, state, texts, digest))


def _put(path: Path, text: str) -> None:
    """Write atomically, but without waiting for the disk: that would take a minute for thousands of
    pages, and a page lost to a power cut is written again because it has no digest."""
    temporary = path.with_name(f".{path.stem[:200]}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _digest_of(path: Path) -> str | None:
    try:
        with path.open(encoding="utf-8") as stream:
            found = _DIGEST.search(stream.read(_HEAD))
    except (OSError, ValueError):
        return None
    return found[1] if found else None


@cache
def _assets() -> str:
    return key_of(*(asset(name) for name in ("cell.html.j2", "common.css", "cell.css")))


@cache
def _style() -> Markup:
    return Markup("\n".join(asset(name).strip() for name in ("common.css", "cell.css")))


def render_cell(
    record: Record, state: tuple[str, str], texts: Mapping[str, str], digest: str = ""
) -> str:
    """The page of a cell. state: its status and reason in the tidy table; texts: changes.json and
    curve.csv beside the record, as far as they exist."""
    curve = read_losses(texts[CURVE]) if CURVE in texts else None
    return environment().get_template("cell.html.j2").render(
        record=record,
        name=facts.name_of(record),
        status=state[0],
        reason=state[1],
        digest=digest,
        style=_style(),
        tasks=facts.tasks(record),
        summary=facts.summary(record),
        costs=facts.costs(record),
        settings=facts.flat(record["settings"]),
        drift=facts.drift(record),
        report=facts.flat(record["report"]),
        provenance=facts.flat(record["provenance"] | {"keys": record["keys"]}),
        churn=facts.churn(record),
        changes=_changes(texts.get(CHANGES), record),
        curve=sparkline(*thinned(*curve)) if curve else None,
    )  # fmt: skip


def _changes(text: str | None, record: Record) -> list[dict[str, Any]]:
    """Samples gained and lost, by task: {title, gained, forgotten}; none if the file is damaged."""
    try:
        found = json.loads(text) if text else {}
        return [
            {
                "title": record["tasks"].get(name, {}).get("title", name),
                "lists": [(kind, _samples(lists.get(kind) or [])) for kind in KINDS],
            }
            for name, lists in sorted(found.items())
            if any(lists.get(kind) for kind in KINDS)
        ]
    except (ValueError, AttributeError, TypeError):
        return []


KINDS = ("forgotten", "gained")
PARTS = ("question", "reference", "before", "after")


def _samples(entries: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {"item": str(entry.get("item", ""))}
        | {part: str(entry[part]) for part in PARTS if entry.get(part) is not None}
        for entry in entries
    ]
