"""Made-up results as a kept suite on the disk, for tests of commands and bundles."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from ballast.results import Results


def keep_fake(results: Results, folder: Path) -> Path:
    """Write records.parquet and items.parquet as `keep` does; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [json.dumps(record, ensure_ascii=False) for record in results.records.values()]
    table = pd.DataFrame({"id": list(results.records), "record": texts})
    table.to_parquet(folder / "records.parquet", index=False)
    results.items.to_parquet(folder / "items.parquet", index=False)
    return folder
