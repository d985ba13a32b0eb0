"""How each number of the page is called, grouped, rounded and read."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

SIGNIFICANT = 4


@dataclass(frozen=True)
class Quantity:
    """One column of numbers.

    digits: decimals that are kept, None for four significant digits; better: 1 if higher is, -1 if
    lower is, 0 if neither; help: its formula or meaning in a sentence; signed: shown with + and −.
    """

    key: str
    title: str
    group: str
    digits: int | None = 2
    unit: str = ""
    better: int = 0
    help: str = ""
    signed: bool = False

    def as_json(self) -> dict[str, Any]:
        """What the page needs to show it, without what is empty."""
        found = {"t": self.title, "g": self.group, "d": self.digits, "u": self.unit}
        found |= {"b": self.better, "h": self.help, "s": int(self.signed)}
        return {key: value for key, value in found.items() if value not in ("", 0) or key == "d"}


POINTS = "points"
TRADEOFF, SCORES, LOSSES, DRIFT = "Trade-off", "Scores", "Losses", "Drift"
COST, EQUAL, OTHER = "Cost", "At equal specialization", "Other"

_FIXED = (
    Quantity("O", "O", TRADEOFF, 2, POINTS, 1, "Overall: O = E + F.", True),
    Quantity("E", "E", TRADEOFF, 2, POINTS, 1, "Specialization: Target − the base's Target.", True),
    Quantity(
        "F", "F", TRADEOFF, 2, POINTS, 1,
        "Stability: mean change over the upstream tasks; negative is forgetting.", True,
    ),
    Quantity(
        "front", "Front", TRADEOFF, 3, "share", 1,
        "Share of bootstrap draws in which the row is on the Pareto front of E and F.",
    ),
    Quantity("source_mean", "Source", TRADEOFF, 2, POINTS, 1, "Mean over the upstream tasks."),
    Quantity("target_mean", "Target", TRADEOFF, 2, POINTS, 1, "Mean over the target's tasks."),
    Quantity("Avg", "Avg", TRADEOFF, 2, POINTS, 1, "(Source + Target) / 2."),
    Quantity("H", "H", TRADEOFF, 2, POINTS, 1, "Harmonic mean 2 S T / (S + T)."),
    Quantity(
        "dce.upstream", "ΔCE", LOSSES, 4, "nats", -1,
        "Mean over the upstream tasks of loss − the base's, nats per token; positive is worse.",
        True,
    ),
    Quantity("trainable_parameters", "Trainable", COST, 0, "parameters", -1),
    Quantity("adapter_bytes", "Adapter", COST, 0, "bytes", -1, "Size of what has to be kept."),
    Quantity("seconds.train", "Training", COST, 3, "s", -1, "Training steps alone."),
    Quantity("seconds.total", "Total time", COST, 3, "s", -1),
    Quantity("step_ms", "Step", COST, 2, "ms", -1, "A training step, median."),
    Quantity(
        "first_step_seconds", "To first step", COST, 2, "s", -1,
        "From the start of the process to the end of the first training step.",
    ),
    Quantity("memory_mb.train", "Memory", COST, 1, "MB", -1, "Highest during training."),
    Quantity("memory_mb.evaluate", "Memory, evaluation", COST, 1, "MB", -1),
    Quantity("tokens", "Tokens", COST, 0, "", 0, "Tokens trained on."),
    Quantity("last_loss", "Last loss", LOSSES, 4, "nats", -1, "Training loss of the last step."),
    Quantity("first_loss", "First loss", LOSSES, 4, "nats", 0),
    Quantity("learning_rate", "Rate", OTHER, None, "", 0, "Peak learning rate."),
    Quantity("scale", "Scale", OTHER, None, "", 0, "Factor before the update that took effect."),
    Quantity("steps", "Steps", OTHER, 0),
)  # fmt: skip
FIXED = {quantity.key: quantity for quantity in _FIXED}
PHASES = ("start", "load", "attach", "train", "merge", "evaluate")
_LEFT_OUT = ("report.", "base.", "base_extra.", "n.", "churn.")


def quantities(columns: Iterable[str], titles: dict[str, str]) -> dict[str, Quantity]:
    """The quantities among the columns of numbers, in the order that a chooser lists them.

    titles: of the tasks, by name. Reports of single methods stand on the cells' pages only.
    """
    found = {key: _quantity(key, titles) for key in columns if not key.startswith(_LEFT_OUT)}
    order = {key: at for at, key in enumerate(FIXED)}
    groups = (TRADEOFF, EQUAL, SCORES, LOSSES, DRIFT, COST, OTHER)
    return dict(
        sorted(
            found.items(),
            key=lambda item: (groups.index(item[1].group), order.get(item[0], 99), item[0]),
        )
    )


def _quantity(key: str, titles: dict[str, str]) -> Quantity:
    if key in FIXED:
        return FIXED[key]
    kind, _, rest = key.partition(".")
    if kind == "score":
        return Quantity(key, titles.get(rest, rest), SCORES, 2, "", 1)
    if kind == "dce":
        help_ = "Loss − the base's loss, nats per token; positive is worse."
        return Quantity(key, f"ΔCE {titles.get(rest, rest)}", LOSSES, 4, "nats", -1, help_, True)
    if kind == "drift":
        return _measure(key, rest, DRIFT)
    if kind == "seconds":
        return Quantity(key, f"Time, {rest}", COST, 3, "s", -1)
    if kind == "extra":
        task, _, name = rest.rpartition(".")
        return Quantity(key, f"{titles.get(task, task)}: {name.replace('_', ' ')}", OTHER, 3)
    return _measure(key, key, OTHER)


def _measure(key: str, name: str, group: str) -> Quantity:
    """A quantity as the registry of measures declares it, if that has it."""
    try:
        measure = importlib.import_module("ballast.measures").MEASURES.get(name)
    except (ImportError, AttributeError):
        measure = None
    if measure is None:
        return Quantity(key, name.replace("_", " "), group, None)
    better = {"higher": 1, "lower": -1}.get(str(measure.better), 0)
    return Quantity(key, measure.title, group, None, measure.unit, better, measure.formula)


def rounded(values: Any, digits: int | None) -> list[float | int | None]:
    """Numbers rounded to what they mean, None for what is missing or not finite."""
    array = np.asarray(values, dtype=float)
    known = np.isfinite(array)
    if digits is None:
        texts = ((f"{v:.{SIGNIFICANT}g}", ok) for v, ok in zip(array, known, strict=True))
        return [_short(float(text)) if ok else None for text, ok in texts]
    array = np.round(np.where(known, array, 0.0), digits) + 0.0
    pairs = zip(array.tolist(), known.tolist(), strict=True)
    return [_short(value) if ok else None for value, ok in pairs]


def _short(value: float) -> float | int:
    """12.0 as 12: a byte or two for each of a million numbers."""
    return int(value) if value == int(value) and abs(value) < 2**53 else value
