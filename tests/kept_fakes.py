"""Made-up results as a kept suite on the disk, for tests of commands and bundles."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from ballast.results import Results

# Titles of methods that terminals, rich, spreadsheets and browsers would take for more than text.
HOSTILE = (
    "<script>alert(1)</script>", "[bold red]x[/bold red]", "[/]", ":smile: [link=http://x.y]z[/link]",
    "\x1b[31mred\x00", "a|b\n| c |", "=1+1", "日本 🎉 é", "[1em]", "{0} %s \\n",
)  # fmt: skip


def keep_fake(results: Results, folder: Path) -> Path:
    """Write records.parquet and items.parquet as `keep` does; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [json.dumps(record, ensure_ascii=False) for record in results.records.values()]
    table = pd.DataFrame({"id": list(results.records), "record": texts})
    table.to_parquet(folder / "records.parquet", index=False)
    results.items.to_parquet(folder / "items.parquet", index=False)
    return folder
