"""Every measure of the suite: what it is called, how it is computed, and how it is read.

`MEASURES` says of each its formula, sign, unit, range and source, and names the function that
computes it. Measures of a record come from `tradeoff.of_record` and `derived`; those of a model
from `drift`, which measures them in the cell's process. Sources that stand for themselves: KYI is
"Keeping Yourself is Important in Downstream Tuning MLLM", arXiv:2503.04543.

Points are scores on 0 to 100 of which higher is better. Losses, perplexities and scores in other
units (CIDEr) never enter a measure in points. Where a denominator is within its noise there is no
value: the quotient would say nothing but the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ballast import tradeoff
from ballast.drift import geometry

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """One measure.

    name: its key in `MEASURES`; column: that of the tidy table; formula, sign (what a positive
    or large value means), unit, range and source: text; better: which end of the range;
    level: record (scores of one cell), model (its weights and predictions) or row (several cells).
    """

    name: str
    title: str
    formula: str
    sign: str
    unit: str
    range: str
    source: str
    better: Literal["higher", "lower", "neither"]
    level: Literal["record", "model", "row"]
    function: Callable[..., Any]

    @property
    def column(self) -> str:
        """Its column in the tidy table; `dce.TASK` is one of each task."""
        if self.name == "delta_ce":
            return "dce.TASK"
        return f"drift.{self.name}" if self.level == "model" else self.name


def cgm_average(target: float | None, source: float | None, upstream: int) -> float | None:
    """(T + N S) / (N + 1), N upstream tasks: every task counts the same. Points."""
    if target is None or source is None:
        return None
    return (target + upstream * source) / (upstream + 1)


def retention(source: float | None, source_base: float | None, noise: float = 0.0) -> float | None:
    """100 S / S_base, percent; None where S_base is within `noise` (points) of 0."""
    return _quotient(source, source_base, noise, 100)


def forgetting_per_gain(
    stability: float | None, specialization: float | None, noise: float = 0.0
) -> float | None:
    """-F / E, points lost per point gained; None where E is within `noise` (points) of 0.

    Where E is negative, nothing was gained to which a loss could be set against: None too.
    """
    if specialization is None or specialization < 0:
        return None
    return _quotient(stability, specialization, noise, -1)


def headroom_gain(
    specialization: float | None, target_base: float | None, noise: float = 0.0
) -> float | None:
    """100 E / (100 - T_base), percent; None where the headroom is within `noise` (points) of 0."""
    room = None if target_base is None else 100 - target_base
    return _quotient(specialization, room, noise, 100)


def _quotient(
    above: float | None, below: float | None, noise: float, factor: float
) -> float | None:
    if above is None or below is None or abs(below) <= noise:
        return None
    return factor * above / below


def derived(record: Record) -> dict[str, float | None]:
    """Measures of a record that is ok, beyond those of `tradeoff.of_record`.

    The noise of a denominator is its standard error over the items: of a mean score, and of E.
    """
    values = tradeoff.of_record(record)
    before = {role: tradeoff.points_of(record, "base_scores", role) for role in _ROLES}
    source_base = tradeoff.source_mean(before["upstream"])
    target_base = tradeoff.target_mean(before["target"])
    e, f, source = values["E"], values["F"], values["source_mean"]
    return {
        "cgm_average": cgm_average(values["target_mean"], source, len(before["upstream"])),
        "retention": retention(source, source_base, _base_error(record, before["upstream"])),
        "forgetting_per_gain": forgetting_per_gain(f, e, _gain_error(record, before["target"])),
        "headroom_gain": headroom_gain(e, target_base, _base_error(record, before["target"])),
    }


_ROLES = ("upstream", "target")


def _base_error(record: Record, tasks: Mapping[str, float]) -> float:
    """Standard error, in points, of the mean of the base's scores over tasks."""
    return _of_mean([_spread(s, record["base_scores"][t]["n"]) for t, s in tasks.items()])


def _gain_error(record: Record, tasks: Mapping[str, float]) -> float:
    """Standard error, in points, of E: paired by item where the record has its churn."""
    variances = []
    for task, before in tasks.items():
        counts = record.get("churn", {}).get(task)
        n = record["scores"][task]["n"]
        if counts:
            gained, lost = counts["gained"] / counts["n"], counts["forgotten"] / counts["n"]
            variances.append(100**2 * (gained + lost - (gained - lost) ** 2) / counts["n"])
        else:
            after = record["scores"][task]["value"]
            variances.append(_spread(after, n) + _spread(before, n))
    return _of_mean(variances)


def _spread(score: float, n: int) -> float:
    """Variance, in points squared, of a mean score in points over n items that are 0 or 1.

    Of items between 0 and 1 it is the most that is possible.
    """
    return max(0.0, score * (100 - score)) / n


def _of_mean(variances: Sequence[float]) -> float:
    return math.sqrt(sum(variances)) / len(variances) if variances else 0.0


_MILORA = "MiLoRA, arXiv:2406.09044, after Kalajdzievski 2024, arXiv:2401.05605"
_POINTS = "points"
_OF_WEIGHTS = "over the matrices that changed: linears of layers and connector, input embedding"


def _of(*measures: Measure) -> dict[str, Measure]:
    return {measure.name: measure for measure in measures}


MEASURES: dict[str, Measure] = _of(
    Measure(
        "E", "Specialization", "mean over the target's tasks of (after − before)",
        "positive: learned", _POINTS, "−100 to 100", "KYI (Task-Expert Specialization)",
        "higher", "record", tradeoff.specialization,
    ),
    Measure(
        "F", "Stability", "mean over the upstream tasks of (after − before)",
        "negative: forgot; 0: kept all", _POINTS, "−100 to 100",
        "KYI (Open-World Stabilization)", "higher", "record", tradeoff.stability,
    ),
    Measure(
        "O", "Overall", "E + F", "positive: gained more than was lost", _POINTS,
        "−200 to 200", "KYI", "higher", "record", tradeoff.overall,
    ),
    Measure(
        "source_mean", "Source", "S = mean score over the upstream tasks", "large: kept",
        _POINTS, "0 to 100", "LoRASculpt, arXiv:2503.16843", "higher", "record",
        tradeoff.source_mean,
    ),
    Measure(
        "target_mean", "Target", "T = mean score over the target's tasks", "large: learned",
        _POINTS, "0 to 100", "LoRASculpt, arXiv:2503.16843", "higher", "record",
        tradeoff.target_mean,
    ),
    Measure(
        "Avg", "Average", "(S + T) / 2", "large: both", _POINTS, "0 to 100",
        "LoRASculpt, arXiv:2503.16843", "higher", "record", tradeoff.average,
    ),
    Measure(
        "H", "Harmonic mean", "2 S T / (S + T)", "large: both; at most Avg", _POINTS,
        "0 to 100", "CGM (Hscore), ECCV 2026", "higher", "record", tradeoff.harmonic_mean,
    ),
    Measure(
        "cgm_average", "CGM's average", "(T + N S) / (N + 1), N upstream tasks",
        "large: every task counts the same, so that upstream weighs N times", _POINTS,
        "0 to 100", "CGM (Avg), ECCV 2026", "higher", "record", cgm_average,
    ),
    Measure(
        "retention", "Retention", "100 S / S_base",
        "100: kept all; below: forgot", "percent", "0 up", "common in studies of forgetting",
        "higher", "record", retention,
    ),
    Measure(
        "forgetting_per_gain", "Forgetting per point gained",
        "−F / E; none where E ≤ its standard error over the items",
        "positive: points lost for each point gained; negative: upstream gained too",
        "points per point", "no bounds", "this suite", "lower", "record", forgetting_per_gain,
    ),
    Measure(
        "headroom_gain", "Headroom-normalised gain", "100 E / (100 − T_base)",
        "100: learned all that was left to learn; negative: lost", "percent", "at most 100",
        "normalised gain, Hake 1998", "higher", "record", headroom_gain,
    ),
    Measure(
        "delta_ce", "ΔCE", "loss after − loss of the base, of one task",
        "positive: worse", "nats per token", "no bounds", "PEFT's method comparison; per task",
        "lower", "record", tradeoff.delta_ce,
    ),
    Measure(
        "kl", "KL(base‖tuned)", "mean over tokens of Σ p_base (log p_base − log p_tuned)",
        "0: predicts as the base", "nats per token", "0 up",
        "Kullback & Leibler 1951, on generic text", "lower", "model", geometry.kl,
    ),
    Measure(
        "forgetting_loss", "Forgetting loss", "L = mean over tokens of −Σ p_base log p_tuned",
        "the base's entropy H: nothing changed; larger: forgot", "nats per token", "H up",
        _MILORA, "lower", "model", geometry.forgetting_loss,
    ),
    Measure(
        "kl_corrected", "Forgetting loss less entropy", "L − H, H = −Σ p_base log p_base",
        "0: predicts as the base; equals kl on the same tokens", "nats per token", "0 up",
        f"{_MILORA}; corrected for the base's entropy", "lower", "model", geometry.kl_corrected,
    ),
    Measure(
        "weight_change", "Relative weight change", f"mean of ‖ΔW‖ / ‖W0‖ {_OF_WEIGHTS}",
        "0: no weight changed", "ratio", "0 up", "Frobenius norms; common", "neither", "model",
        geometry.weight_change,
    ),
    Measure(
        "changed_share", "Linears changed",
        "linears that changed / all linears of the layers and the connector",
        "0: none; 1: all", "share", "0 to 1", "this suite", "neither", "model",
        geometry.changed_share,
    ),
    Measure(
        "activation_change", "Relative change of activations",
        "mean over linears of the mean over tokens of ‖Δ(x)‖ / ‖x‖, Δ(x) = module(x) − W0 x − b0, "
        "x the base's own inputs",
        "0: no linear computes anything else", "ratio", "0 up",
        "F_Δ of retention studies; kin of PEFT-Arena's CSD, arXiv:2605.28819", "neither", "model",
        geometry.activation_change,
    ),
    Measure(
        "effective_rank", "Effective rank of ΔW",
        f"mean of exp(−Σ p log p), p = σ / Σσ of ΔW, {_OF_WEIGHTS}",
        "large: many directions changed; 0: none", "directions", "0 to the smaller dimension",
        "Roy & Vetterli 2007", "neither", "model", geometry.effective_rank,
    ),
    Measure(
        "density", "Density of ΔW", f"entries that changed / all entries, {_OF_WEIGHTS}",
        "0: none changed; 1: all", "share", "0 to 1", "common in sparse tuning", "neither",
        "model", geometry.density,
    ),
    Measure(
        "top_share", "ΔW in the top singular space",
        "mean of ‖U_kᵀ ΔW V_k‖² / ‖ΔW‖², U_k and V_k the singular vectors of W0's k largest "
        f"singular values, k a tenth of them, {_OF_WEIGHTS}",
        "large: works on what W0 does most; k²/(m n) if it knows nothing of W0", "share",
        "0 to 1", "after LoRA, arXiv:2106.09685, section 7.3", "neither", "model",
        geometry.top_share,
    ),
    Measure(
        "cka", "CKA", "mean over layers of linear CKA of the hidden states, base against tuned, on "
        "the same tokens", "1: same geometry", "share", "0 to 1",
        "Kornblith et al. 2019, arXiv:1905.00414", "higher", "model", geometry.cka,
    ),
)  # fmt: skip


def page() -> str:
    """The registry as Markdown: a table of each level's measures, by column of the tidy table."""
    titles = {"record": "Of a cell's scores", "model": "Of its model", "row": "Of several cells"}
    parts = []
    for level, title in titles.items():
        chosen = [m for m in MEASURES.values() if m.level == level]
        if chosen:
            parts.append(f"### {title}\n\n{_table(chosen)}\n")
    return "\n".join(parts)


def _table(chosen: Sequence[Measure]) -> str:
    arrows = {"higher": "↑", "lower": "↓", "neither": ""}
    head = ("Column", "Measure", "Formula", "Sign", "Unit", "Range", "Better", "Source")
    rows = [
        (f"`{m.column}`", m.title, m.formula, m.sign, m.unit, m.range, arrows[m.better], m.source)
        for m in chosen
    ]
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in r) + " |" for r in lines
    )
