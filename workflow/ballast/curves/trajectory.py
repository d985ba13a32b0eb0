"""The trajectory of a cell: trained once more, scored downstream and upstream at checkpoints.

Training is the cell's own, step for step; whether it came to the same end is checked against the
adapter that the record names. Scores on the way are those of the model with its adapters attached.
"""

from __future__ import annotations

import json
from typing import Any

from ballast.cell import make_tuner
from ballast.curves import Curve, finished_record, new_curve, point
from ballast.curves.points import Scorer, work_on
from ballast.layout import Layout
from ballast.outcome import ADAPTER
from ballast.progress import Progress
from ballast.tensorfile import tensors_digest


def checkpoint_steps(total: int, count: int) -> list[int]:
    """Steps after which a cell is scored: `count` of them evenly spaced, the last at the end."""
    return sorted({max(1, round(total * place / count)) for place in range(1, count + 1)})


def run_trajectory(row: dict[str, Any], layout: Layout, report: Any = None) -> Curve:
    """The trajectory of a plan's row, trained and scored in this process; nothing is written.

    A cell that failed, or that no training made, has no points but a reason in `left_out`. Where
    the end is not byte for byte the cell's adapter, `identical` is false and the end is scored
    anew. Raises BallastError if the cell has not been run as planned.
    """
    from ballast.training import Trainer

    report = report or Progress(row["id"])
    record = finished_record(row, layout)
    curve = new_curve(row, "trajectory", record)
    if curve["left_out"]:
        return curve
    spec = json.loads(row["spec"])
    work = work_on(row, spec, layout, report)
    scorer = Scorer(work, layout, curve["settings"]["items"])
    total = spec["training"]["steps"]
    *between, _ = checkpoint_steps(total, curve["settings"]["checkpoints"])
    points = [point(0.0, scorer.base_scores(record), step=0)]

    def watch(step: int, steps: int, loss: float) -> None:
        report.step(step, steps, loss)
        if step in between:
            points.append(point(step / total, scorer(), step=step))

    examples = work.examples()
    tuner = work.tuner = make_tuner(work.base, spec, layout)
    Trainer(tuner, examples, spec["training"], spec["seed"], None, watch).run()
    identical = tensors_digest(tuner.tensors()) == record["files"][ADAPTER]
    if identical:
        scores = scorer.end_scores(record)
    else:
        report.note("did not come to the cell's own end; scoring this one")
        if spec["merges"]:
            tuner.merge()
        scores = scorer()
    points.append(point(1.0, scores, step=total))
    return curve | {"identical": identical, "points": points}
