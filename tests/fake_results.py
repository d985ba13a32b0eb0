"""Whole suites of made-up results, with items, churn, drift and curves, of any size."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ballast.declare import FAMILIES
from ballast.results import CURVE_COLUMNS, ITEM_COLUMNS, Results
from ballast.tables import tidy
from fake_records import BASE, record

TASKS = ("facts", "sums", "codes")  # those in points; the others' items are left out


def fake_results(
    methods: int = 6, ranks: tuple[int | None, ...] = (2, 8), seeds: int = 3, items: int = 40,
    targets: tuple[str, ...] = ("codes",), names: tuple[str, ...] = (), seed: int = 0,
) -> Results:  # fmt: skip
    """Records whose scores agree with their items; `names` are given to the first methods."""
    draw = np.random.default_rng(seed)
    labels = [*names, "lora", *(f"method{i}" for i in range(methods))][:methods]
    before = {t: (np.arange(items) < items * BASE[t] / 100).astype(float) for t in TASKS}
    records, frames, points = [], [], []
    for target in targets:
        for at, name in enumerate(labels):
            for rank in ranks:
                skill = draw.uniform(0.2, 0.9)
                for s in range(seeds):
                    found = record(
                        "lora" if name == "lora" else f"m{at}", s, rank, target=target, title=name,
                        family=FAMILIES[at % len(FAMILIES)],
                    )  # fmt: skip
                    found["churn"] = {}
                    for task in TASKS:
                        right = skill if task == "codes" else 0.9 - skill / 2
                        after = (draw.random(items) < right).astype(float)
                        form = np.where(after > 0, 0, draw.integers(0, 3, items))
                        loss = np.where(after > 0, 0.1, 2.0)
                        found["scores"][task] |= {"value": 100 * after.mean(), "n": items}
                        found["base_scores"][task] |= {
                            "value": 100 * before[task].mean(),
                            "n": items,
                        }
                        found["churn"][task] = _churn(before[task], after, form, loss)
                        frames.append(
                            pd.DataFrame(
                                {
                                    "cell": found["id"], "task": task, "item": np.arange(items),
                                    "subject": "", "score": after, "loss": loss, "form": form,
                                    "base_score": before[task], "base_loss": 0.5,
                                    "base_form": 0,
                                }
                            )
                        )  # fmt: skip
                    found["drift"] = {"kl": skill / 3, "weight_change": skill / 20, "cka": 0.9}
                    records.append(found)
                    for share in (0.0, 0.5, 1.0):
                        points.append(
                            dict.fromkeys(CURVE_COLUMNS)
                            | {
                                "cell": found["id"], "kind": "rewind", "share": share,
                                "alpha": share, "E": 50 * skill * share, "F": -30 * share**2,
                            }
                        )  # fmt: skip
    frame = pd.concat(frames, ignore_index=True)[list(ITEM_COLUMNS)]
    frame[["cell", "task", "subject"]] = frame[["cell", "task", "subject"]].astype("category")
    return Results(
        suite="tiny",
        table=tidy(records, None),
        records={r["id"]: r for r in records},
        items=frame,
        curves=pd.DataFrame(points, columns=list(CURVE_COLUMNS)),
    )


def _churn(
    before: np.ndarray, after: np.ndarray, form: np.ndarray, loss: np.ndarray
) -> dict[str, int]:
    was, now = before >= 0.5, after >= 0.5
    lost = was & ~now
    return {
        "n": len(was),
        "kept": int((was & now).sum()),
        "gained": int((~was & now).sum()),
        "forgotten": int(lost.sum()),
        "never": int((~was & ~now).sum()),
        "forgotten_form": int((lost & (form > 0)).sum()),
        "forgotten_likely": int((lost & (loss <= np.log(2))).sum()),
    }
