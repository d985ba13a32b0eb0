"""The rewind of a finished cell: W0 + alpha (W - W0), scored at some alphas.

Every weight that tuning changed goes back by the same share, embeddings included. An encoder's
classification head stays as it was trained: its start is random, so that there is no way back. The
ends are known: alpha 0 is the base, alpha 1 the cell's record. Source: WiSE-FT, arXiv:2109.01903.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ballast.cell import make_tuner
from ballast.curves import Curve, finished_record, new_curve, point
from ballast.curves.points import Scorer, work_on
from ballast.encoders import HEAD
from ballast.layout import Layout
from ballast.outcome import ADAPTER
from ballast.progress import Progress
from ballast.tensorfile import read_tensors


def run_rewind(row: dict[str, Any], layout: Layout, report: Any = None) -> Curve:
    """The rewind of a plan's row, in this process; nothing is written.

    A cell that failed, or whose method does not merge, has no points but a reason in `left_out`.
    Raises BallastError if the cell has not been run as planned, DataError if its adapter is
    damaged.
    """
    report = report or Progress(row["id"])
    record = finished_record(row, layout)
    curve = new_curve(row, "rewind", record)
    if curve["left_out"]:
        return curve
    spec = json.loads(row["spec"])
    work = work_on(row, spec, layout, report)
    scorer = Scorer(work, layout, curve["settings"]["items"])
    way = _way(work, record["files"][ADAPTER])
    points = [point(0.0, scorer.base_scores(record), alpha=0.0)]
    for alpha in sorted(curve["settings"]["alphas"]):
        move(way, alpha)
        points.append(point(alpha, scorer(), alpha=alpha))
        report.note(f"alpha {alpha:g} scored")
    points.append(point(1.0, scorer.end_scores(record), alpha=1.0))
    # Tensors with another digest than the record's would not have been read.
    return curve | {"identical": True, "points": points}


Way = list[tuple[Tensor, Tensor, Tensor]]  # each weight in the model, its start and its end


def _way(work: Any, digest: str) -> Way:
    """Put the finished cell's weights into the model; returns those that differ from the base."""
    start = {name: value.clone() for name, value in work.base.model.state_dict().items()}
    tensors, _ = read_tensors(work.folder / ADAPTER, digest)
    if work.row["posthoc"]:
        work.put(tensors)
    else:
        tuner = make_tuner(work.base, work.spec, work.layout)
        tuner.restore(tensors)
        tuner.merge()
    return [
        (value, start[name], value.clone())
        for name, value in work.base.model.state_dict().items()
        if not name.startswith(f"{HEAD}.") and not torch.equal(value, start[name])
    ]


@torch.no_grad()
def move(way: Way, alpha: float) -> None:
    """Set the weights to W0 + alpha (W - W0), computed in at least fp32; exact at 0 and 1."""
    for value, start, end in way:
        kind = torch.promote_types(value.dtype, torch.float32)
        value.copy_(torch.lerp(start.to(kind), end.to(kind), alpha))
