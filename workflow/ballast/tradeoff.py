"""What a method learned and what it made the base forget: one function for each measure.

All of them take points: scores on 0 to 100 of which higher is better. Losses, perplexities and
CIDEr never enter, nor do probes; `of_record` makes that choice. Where a measure has nothing to work
on it is None, never 0.

Sources: KYI is "Keeping Yourself is Important in Downstream Tuning MLLM",
arXiv:2503.04543; LoRASculpt is arXiv:2503.16843; CGM (ECCV 2026) reports Hscore = 2 T P / (T + P).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

Scores = Mapping[str, float]


def specialization(after: Scores, before: Scores) -> float | None:
    """E = mean over the target's tasks of (after − before), in points.

    Sign: positive = learned. Range: −100 to 100. Source: KYI (Task-Expert Specialization).
    """
    return _mean_change(after, before)


def stability(after: Scores, before: Scores) -> float | None:
    """F = mean over the upstream tasks of (after − before), in points.

    Sign: negative = forgot, 0 = kept all. Range: −100 to 100. Source: KYI (Open-World
    Stabilization); the sign follows from O = E + F having to reward stability.
    """
    return _mean_change(after, before)


def overall(e: float | None, f: float | None) -> float | None:
    """O = E + F, in points. Sign: positive = gained more than was lost. Range: −200 to 200. KYI."""
    return None if e is None or f is None else e + f


def source_mean(scores: Scores) -> float | None:
    """Source S = mean score over the upstream tasks, in points, 0 to 100. Source: LoRASculpt."""
    return fmean(scores.values()) if scores else None


def target_mean(scores: Scores) -> float | None:
    """Target T = mean score over the target's tasks, in points, 0 to 100. Source: LoRASculpt."""
    return fmean(scores.values()) if scores else None


def average(source: float | None, target: float | None) -> float | None:
    """Avg = (S + T) / 2, in points, 0 to 100; higher is better. Source: LoRASculpt."""
    return None if source is None or target is None else (source + target) / 2


def harmonic_mean(source: float | None, target: float | None) -> float | None:
    """H = 2 S T / (S + T), in points, 0 to 100; higher is better, at most Avg. Source: CGM.

    None where S + T = 0, for which it is not defined.
    """
    if source is None or target is None or source + target == 0:
        return None
    return 2 * source * target / (source + target)


def delta_ce(after: float | None, before: float | None) -> float | None:
    """ΔCE = loss after − loss of the base, in nats per token of one task.

    Sign: positive = worse. No bounds. It has columns of its own and is never averaged with points.
    """
    return None if after is None or before is None else after - before


def _mean_change(after: Scores, before: Scores) -> float | None:
    if set(after) != set(before):
        raise ValueError(f"different tasks: {sorted(set(after) ^ set(before))}")
    return fmean(after[name] - before[name] for name in after) if after else None


MEASURES = ("source_mean", "target_mean", "E", "F", "O", "Avg", "H")


def points_of(record: Mapping[str, Any], block: str, role: str) -> dict[str, float]:
    """Scores of the tasks with this role in points, from the block `scores` or `base_scores`."""
    return {
        name: record[block][name]["value"]
        for name, task in sorted(record["tasks"].items())
        if task["role"] == role and task["unit"] == "points"
    }


def of_record(record: Mapping[str, Any]) -> dict[str, float | None]:
    """All of `MEASURES` of a record that is ok: only tasks in points enter, and no probe does."""
    upstream, target = (
        points_of(record, "scores", "upstream"),
        points_of(record, "scores", "target"),
    )
    s, t = source_mean(upstream), target_mean(target)
    e = specialization(target, points_of(record, "base_scores", "target"))
    f = stability(upstream, points_of(record, "base_scores", "upstream"))
    values = (s, t, e, f, overall(e, f), average(s, t), harmonic_mean(s, t))
    return dict(zip(MEASURES, values, strict=True))


def non_dominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """For each point whether no other is at least as high in both coordinates and higher in one."""
    return [not any(a >= x and b >= y and (a > x or b > y) for a, b in points) for x, y in points]
