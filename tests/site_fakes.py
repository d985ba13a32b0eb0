"""Analyses made up from real means, for tests of pages: fast with any number of rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd

from ballast.results import Results
from ballast.statistics.analysis import COMPARED, Analysis
from ballast.statistics.rows import frame_of, rows_of


def fake_analyses(results: Results) -> dict[tuple[str, str], Analysis]:
    """One for every base and target: true means and intervals, invented ranks and tests."""
    return {place: fake_analysis(results, *place) for place in results.places()}


def fake_analysis(results: Results, base: str, target: str) -> Analysis:
    rows = frame_of(rows_of(results.table, base, target)).copy()
    more = {}
    for q in COMPARED:
        values = rows[q].astype("float64") if q in rows else pd.Series(np.nan, index=rows.index)
        place = values.rank(ascending=False)
        more[f"{q}.rank_low"] = (place - 2).clip(lower=1).round().astype("Int64")
        more[f"{q}.rank_high"] = (place + 2).clip(upper=len(rows)).round().astype("Int64")
        gap = values - values.mean()
        more |= {f"{q}.diff": gap, f"{q}.diff_low": gap - 2, f"{q}.diff_high": gap + 2}
        more |= {f"{q}.{p}": 0.04 + 0 * gap for p in ("p", "p_adjusted", "p_base_adjusted")}
    more["front"] = pd.Series(np.linspace(1, 0, len(rows)), index=rows.index)
    rows = pd.concat([rows, pd.DataFrame(more)], axis=1)
    facts = {"seeds": int(rows["n_ok"].max()), "draws": 100, "hypervolume": 0.61}
    facts |= {"hypervolume_low": 0.58, "hypervolume_high": 0.64}
    facts |= {f"{q}.minimum_detectable": 3.2 for q in COMPARED}
    facts |= {f"{q}.noise_floor": 2.1 for q in COMPARED}
    definitions = pd.DataFrame(
        {"a": ["O", "O"], "b": ["H", "Avg"], "tau": [0.91, 1.0], "n": [9, 9]}
    )
    notes = ("Intervals are t intervals over seeds.", "Ranks are shared by rows that tie.")
    return Analysis(
        base, target, str(rows.index[0]), rows, pd.DataFrame(), definitions, facts, notes
    )


def many_results(cells: int, places: int = 4, seeds: int = 3) -> Results:
    """A suite of that many cells over a few bases and targets; every 50th cell has failed."""
    from ballast.declare import FAMILIES
    from ballast.results import ITEM_COLUMNS
    from ballast.tables import tidy
    from fake_records import failed, record

    draw = np.random.default_rng(0)
    records = []
    for at in range(cells):
        row, seed = divmod(at, seeds)
        group, place = divmod(row, places)
        method, rank = f"m{group // 4}", 2 ** (1 + group % 4)
        found = record(
            method, seed, rank, e=float(draw.uniform(0, 90)), f=float(draw.uniform(-70, 0)),
            base=f"base{place // 2}", target=f"codes{place % 2}", title=f"Method {group // 4}",
            family=FAMILIES[(group // 4) % len(FAMILIES)],
        )  # fmt: skip
        found["churn"] = {
            task: {"n": 300, "kept": 150, "gained": 30, "forgotten": 70, "never": 50}
            | {"forgotten_form": 20, "forgotten_likely": 5}
            for task in ("facts", "sums", "codes")
        }
        found["drift"] = {"kl": float(draw.uniform(0, 1))}
        records.append(failed(found) if at % 50 == 7 else found)
    return Results(
        suite="many",
        table=tidy(records, None),
        records={item["id"]: item for item in records},
        items=pd.DataFrame(columns=ITEM_COLUMNS),
    )


def with_folder(results: Results, folder: Path, text: str) -> Results:
    """The same results with changes.json and curve.csv of every cell, `text` in the samples."""
    sample = {"item": 3, "question": f"{text} question", "reference": "1", "before": "1"}
    changes = {"facts": {"gained": [], "forgotten": [sample | {"after": f"{text} after"}]}}
    curve = "step,loss\n" + "".join(f"{i},{3 / i}\n" for i in range(1, 101))
    for cell in results.records:
        (folder / "cells" / cell).mkdir(parents=True)
        (folder / "cells" / cell / "changes.json").write_text(json.dumps(changes))
        (folder / "cells" / cell / "curve.csv").write_text(curve)
    return dataclasses.replace(results, folder=folder)


def rebuilt(results: Results, records: list[dict]) -> Results:
    """The results with other records in place of theirs."""
    from ballast.tables import tidy

    by_id = {item["id"]: item for item in records}
    return dataclasses.replace(results, table=tidy(records), records=by_id)
