"""Which cells do not fit a device, and which settings would make them fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from ballast.forecast.holding import Footprint, footprint_guess
from ballast.forecast.need import Need, cell_need
from ballast.forecast.prepare import Preparation
from ballast.forecast.suite import BaseForecast, Forecast, prepared
from ballast.tasks import Task

Settings = dict[str, Any]


@dataclass(frozen=True)
class TooLarge:
    """Cells of one method on one base and target that need more than there is (MB).

    needed_mb: with examples as long as the settings allow; where there is no advice, with the
    settings that need the least. target and method are empty where it is the base
    itself that cannot be scored before its cells.
    """

    base: str
    target: str
    method: str
    cells: int
    kind: str  # "GPU" or "host"
    needed_mb: float
    there_mb: float
    parts: dict[str, float]
    advice: Settings | None


def too_large(
    forecast: Forecast, tasks: dict[str, Task], device_mb: float | None, host_mb: float
) -> list[TooLarge]:
    """What is due and does not fit, bases first; device_mb None: no GPU is known, none is checked.

    Host memory is checked for every cell, also for one on a GPU.
    """
    due = forecast.due
    checks = [("host", due, "most_memory_mb", host_mb)]
    if device_mb is not None:
        checks.append(("GPU", due[due["gpu"].astype(bool)], "most_device_mb", device_mb))
    found = []
    for kind, table, column, there in checks:
        bases = [forecast.bases[name] for name in dict.fromkeys(due["base"])]
        found += [
            _base_explained(forecast, tasks, base, kind, there)
            for base in bases
            if not base.ready and _prepared_mb(base.preparation, kind) > there
        ]
        large = table[table[column] > there]
        for _, rows in large.groupby(["base", "target", "method"], sort=False):
            worst = rows.loc[rows[column].idxmax()]
            found.append(_explained(forecast, tasks, worst, len(rows), kind, column, there))
    return sorted(found, key=lambda item: bool(item.method))


def _base_explained(
    forecast: Forecast, tasks: dict[str, Task], base: BaseForecast, kind: str, there: float
) -> TooLarge:
    takes = [(c, prepared(forecast, base, tasks, c)) for c in _base_changes(forecast, base)]
    fitting = [change for change, taken in takes if _prepared_mb(taken, kind) <= there]
    shown, advice = base.preparation, None
    if fitting:
        named = {"precisions": "precision", "batch_size": "evaluation.batch_size"}
        first = fitting[0].items()
        advice = {named[key]: "bf16" if key == "precisions" else value for key, value in first}
    else:
        shown = min((taken for _, taken in takes), key=lambda taken: _prepared_mb(taken, kind))
    needed = _prepared_mb(shown, kind)
    return TooLarge(base.name, "", "", 0, kind, needed, there, shown.parts, advice)


def _base_changes(forecast: Forecast, base: BaseForecast) -> list[Settings]:
    """Settings that make scoring a base smaller, from the mildest to the harshest."""
    own = [spec for spec in forecast.specs.values() if spec["base"] == base.name]
    batch = own[0]["evaluation"]["batch_size"]
    whole = any(spec["training"]["precision"] == "fp32" for spec in own)
    halves: list[Settings] = [{}, {"precisions": ["bf16"]}] if whole else [{}]
    return [
        half | ({"batch_size": size} if size < batch else {})
        for half in halves
        for size in (batch, 16, 4, 1)
        if size <= batch
    ]


def _prepared_mb(taken: Preparation, kind: str) -> float:
    return taken.device_mb if kind == "GPU" else taken.host_mb


def _explained(
    forecast: Forecast,
    tasks: dict[str, Task],
    worst: pd.Series,
    number: int,
    kind: str,
    column: str,
    there: float,
) -> TooLarge:
    spec = forecast.specs[worst["group"]]
    plain = _need(forecast, tasks, spec, worst)
    # What finished cells showed beyond the shapes stays, whatever the settings.
    more = worst[column] - _peak(plain, kind)
    needs = ((c, _need(forecast, tasks, _with(spec, c), worst)) for c in _changes(spec))
    advice, needed, shown = None, worst[column], plain
    for change, need in needs:
        if _peak(need, kind) + more <= there:
            advice = change
            break
        if _peak(need, kind) < _peak(shown, kind):
            shown = need
    if advice is None:
        needed, plain = _peak(shown, kind) + more, shown
    parts = plain.parts if kind == "GPU" else plain.host_parts
    who = (spec["base"], spec["target"], spec["method"])
    return TooLarge(*who, number, kind, needed, there, parts, advice)


def _need(
    forecast: Forecast, tasks: dict[str, Task], spec: dict[str, Any], worst: pd.Series
) -> Need:
    network = forecast.bases[spec["base"]].network
    return cell_need(
        spec,
        network,
        tasks,
        forecast.machine,
        trainable=worst["trainable"],
        longest=True,
        footprint=_footprint_in(forecast, spec, worst),
    )


def _footprint_in(forecast: Forecast, spec: Settings, worst: pd.Series) -> Footprint | None:
    """The footprint of a cell, in a changed precision too: then only autocast's copies are new."""
    found = forecast.footprints.get(worst["group"])
    before = forecast.specs[worst["group"]]["training"]["precision"]
    if found is None or before == spec["training"]["precision"]:
        return found
    guess = footprint_guess(spec, forecast.bases[spec["base"]].network, worst["trainable"])
    return replace(found, activations=guess.activations, copies=guess.copies)


def _peak(need: Need, kind: str) -> float:
    return need.device_mb if kind == "GPU" else need.host_mb


def _changes(spec: dict[str, Any]) -> Iterator[Settings]:
    """Settings from the mildest to the harshest; smaller batches keep the examples of a step."""
    training, batch = spec["training"], spec["training"]["batch_size"]
    steps: list[Settings] = [{}]
    if training["precision"] == "fp32":
        steps.append({"precision": "bf16"})
    if not training["gradient_checkpointing"]:
        steps.append(steps[-1] | {"gradient_checkpointing": True})
    smaller = [size for size in (batch // 2**k for k in range(1, 12)) if size >= 1]
    for size in smaller:
        accumulated = training["accumulation"] * -(-batch // size)
        steps.append(steps[-1] | {"batch_size": size, "accumulation": accumulated})
    for change in steps:
        for scored in (spec["evaluation"]["batch_size"], 16, 4, 1):
            if scored == spec["evaluation"]["batch_size"]:
                if change:
                    yield change
            elif scored < spec["evaluation"]["batch_size"]:
                yield change | {"evaluation.batch_size": scored}


def _with(spec: dict[str, Any], change: Settings) -> dict[str, Any]:
    scored = change.get("evaluation.batch_size", spec["evaluation"]["batch_size"])
    own = {key: value for key, value in change.items() if "." not in key}
    return spec | {
        "training": spec["training"] | own,
        "evaluation": spec["evaluation"] | {"batch_size": scored},
    }


def advice_text(advice: Settings | None) -> str:
    """The settings in the words of a suite's file."""
    if advice is None:
        return "no setting of the suite makes it fit: a smaller base, or a larger device"
    own = [f"{key}: {_yaml(value)}" for key, value in advice.items() if "." not in key]
    parts = [f"training: {{{', '.join(own)}}}"] if own else []
    if "evaluation.batch_size" in advice:
        parts.append(f"evaluation: {{batch_size: {advice['evaluation.batch_size']}}}")
    return "fits with " + ", ".join(parts)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
