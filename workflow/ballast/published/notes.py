"""What stands below a side-by-side table."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd

from ballast.published.agreement import LEAST, LEAST_INTERVAL, Agreement

DIFFERS = ("model", "target", "task", "unit", "rank", "variant")


def notes_of(
    table: pd.DataFrame,
    agreements: Mapping[str, Agreement],
    block: pd.DataFrame,
    methods: Collection[str],
    about: Mapping[str, Any],
) -> list[str]:
    """Sentences, plain text. block: the published rows; methods: ours; about: the protocol."""
    notes = [_sentence(name, found) for name, found in agreements.items()]
    words = {word for text in table["differs_in"] for word in text.split(", ")}
    if differs := [word for word in DIFFERS if word in words]:
        notes.append(
            "The difference is left out where something that decides it is not the same "
            f"({', '.join(differs)}): only the order is compared there."
        )
    if missing := sorted(set(block["method"]) - set(methods)):
        notes.append(f"Published, not run here: {', '.join(missing)}.")
    if about.get("caution"):
        notes.append(f"Caution: {about['caution']}.")
    if about.get("unknown"):
        notes.append(f"Not known of the protocol: {', '.join(about['unknown'])}.")
    flagged = block.loc[block["note"].str.contains("unreliable"), "label"]
    if len(flagged):
        notes.append(f"Unreliable as published: {', '.join(sorted(set(flagged)))}.")
    return notes


def _sentence(name: str, found: Agreement) -> str:
    if found.tau is None:
        why = "fewer than three" if found.n < LEAST else "one side ties throughout"
        return f"{name}: rows matched: {found.n}; no tau ({why})."
    text = f"{name}: Kendall's tau-b {found.tau:.2f} over {found.n} rows, p = {found.p:.2g}"
    if found.low is None:
        return f"{text}; no interval with fewer than {LEAST_INTERVAL}."
    return (
        f"{text}; 95 % interval {found.low:.2f} to {found.high:.2f} (asymptotic, Fisher's z with "
        "Fieller's variance; the noise of the scores is not in it)."
    )
