"""`snakemake benchmark`: where a run's time went, and what every method costs.

Each row compares one method at one shape with the frozen base's own forward and activation-gradient
step, and with PEFT's twin of the method (`twins.py`); what is measured, and how: `measure.py`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from ballast.declare import MethodFile
from ballast.errors import BallastError, SuiteError, unknown
from ballast.measure import (
    Shape,
    inference,
    interleaved,
    median_interval,
    peak_bytes,
    runners,
    saved_bytes,
)
from ballast.models import DTYPES

PAIRS = (("ours", "base"), ("peft", "base"), ("ours", "peft"))
MB = 2**20


@dataclass(frozen=True)
class Settings:
    """What to measure: every combination of widths, token counts and precisions.

    methods: names, or empty for all that train on text; generated: tokens of the inference part,
    0 leaves it out.
    """

    hidden: tuple[int, ...] = (512,)
    tokens: tuple[int, ...] = (1024,)
    precision: tuple[str, ...] = ("fp32",)
    methods: tuple[str, ...] = ()
    rounds: int = 10
    rank: int = 16
    layers: int = 4
    generated: int = 16

    @classmethod
    def of(cls, values: dict[str, Any]) -> Settings:
        """From a suite's `benchmark` block; a single value stands for a list of one.

        Raises SuiteError for a key or a precision that there is not.
        """
        known = cls.__dataclass_fields__
        found: dict[str, Any] = {}
        for key, value in values.items():
            if key not in known:
                raise SuiteError(f"benchmark: {unknown('key', key, known)}")
            many = isinstance(known[key].default, tuple)
            single = many and not isinstance(value, list | tuple)
            found[key] = (value,) if single else tuple(value) if many else value
        for name in found.get("precision", ()):
            if name not in DTYPES:
                raise SuiteError(f"benchmark.precision: {name!r}; allowed: {', '.join(DTYPES)}")
        return cls(**found)

    def shapes(self) -> Iterator[Shape]:
        """Every combination, the small ones first."""
        for hidden in self.hidden:
            for tokens in self.tokens:
                for precision in self.precision:
                    yield Shape(hidden, tokens, precision, self.rank, self.layers)


def measure(
    method: MethodFile, shape: Shape, rounds: int, generated: int, with_peft: bool
) -> dict[str, Any]:
    """One row: ratios are medians over interleaved rounds with 95 % intervals."""
    found = runners(shape, method, with_peft)
    for runner in found.values():
        runner.step()
    row: dict[str, Any] = {
        "method": method.name,
        "hidden": shape.hidden,
        "tokens": shape.tokens,
        "dtype": shape.precision,
        "rank": shape.rank,
        "layers": shape.layers,
        "rounds": rounds,
    }
    seconds = interleaved({name: runner.step for name, runner in found.items()}, rounds)
    row["base_ms"] = 1000 * float(np.median(seconds["base"]))
    for top, bottom in PAIRS:
        ratio: tuple[float | None, ...] = (None, None, None)
        if top in found and bottom in found:
            ratio = median_interval(list(np.divide(seconds[top], seconds[bottom])))
        for label, value in zip(("", "_low", "_high"), ratio, strict=True):
            row[f"{top}_over_{bottom}{label}"] = value
    for name, prefix in (("ours", ""), ("peft", "peft_")):
        runner = found.get(name)
        row[f"{prefix}start_seconds"] = runner.started if runner else None
    saved = {name: saved_bytes(runner) for name, runner in found.items()}
    peak = {name: peak_bytes(runner) for name, runner in found.items()}
    row["base_saved_mb"] = saved["base"] / MB
    for name, prefix in (("ours", ""), ("peft", "peft_")):
        measured = name in found
        row[f"{prefix}saved_extra_mb"] = (saved[name] - saved["base"]) / MB if measured else None
        row[f"{prefix}memory_over_base"] = peak[name] / peak["base"] if measured else None
    # What selective tuning has changed is plain weights: there is nothing to generate unmerged.
    plain = method.declaration.family == "selective"
    return row | _inference(found, rounds, 0 if plain else generated)


def _inference(found: dict[str, Any], rounds: int, generated: int) -> dict[str, float | None]:
    """Latency per token and bytes of the cache, unmerged, over the base's."""
    row: dict[str, float | None] = {}
    steps, held = {}, {}
    if generated:
        for name, runner in found.items():
            steps[name], held[name] = inference(runner, tokens=generated)
    seconds = interleaved(steps, max(1, rounds // 3)) if steps else {}
    base = float(np.median(seconds["base"])) if generated else None
    row["base_token_ms"] = 1000 * base / generated if base else None
    row["base_cache_bytes"] = held.get("base")
    for name, prefix in (("ours", ""), ("peft", "peft_")):
        both = generated and name in found
        ratio = np.median(np.divide(seconds[name], seconds["base"])) if both else None
        row[f"{prefix}token_over_base"] = float(ratio) if both else None
        row[f"{prefix}cache_extra_bytes"] = held[name] - held["base"] if both else None
    return row


def time_by_phase(records: list[dict[str, Any]]) -> pd.DataFrame:
    """Seconds by base, method and phase over the cells that finished: where a run's time goes."""
    rows = [
        {
            "base": record["identity"]["base"],
            "method": record["identity"]["method"],
            **record["costs"]["seconds"],
            "first_step": record["costs"]["first_step_seconds"],
        }
        for record in records
        if record["status"] == "ok"
    ]
    if not rows:
        return pd.DataFrame(columns=["base", "method", "cells", "total"])
    table = pd.DataFrame(rows)
    grouped = table.groupby(["base", "method"])
    sums = grouped.sum(numeric_only=True).drop(columns="first_step")
    sums.insert(0, "cells", grouped.size())
    sums["seconds_to_first_step"] = grouped["first_step"].median()
    return sums.round(2).reset_index()


def to_markdown(steps: pd.DataFrame, phases: pd.DataFrame, about: str) -> str:
    """Both tables as Markdown, with what was measured and how."""
    shown = steps.drop(columns=[c for c in steps if c.endswith(("_low", "_high"))])
    lines = ["# Where the time goes", "", "Seconds, summed over finished cells, by phase.", ""]
    lines += [phases.to_markdown(index=False, floatfmt=".2f"), "", "# Cost of a training step", ""]
    lines += [about, "", shown.to_markdown(index=False, floatfmt=".3f"), ""]
    return "\n".join(lines)


def _about(settings: Settings, version: str | None) -> str:
    return (
        "Training step (forward, backward, the method's work on loss and gradients; no optimiser) "
        f"over the frozen base's own forward and activation-gradient step, and over PEFT {version}'"
        f"s: medians over {settings.rounds} interleaved rounds, intervals in steps.csv; rank "
        f"{settings.rank}, {settings.layers} layers, dropout 0, {torch.get_num_threads()} threads. "
        "saved: what forward keeps for backward, beyond the base's; memory: parameters, buffers "
        "and the step's peak; token: latency per generated token, unmerged; cache: bytes beyond "
        "the base's."
    )


def write_benchmark(
    methods: dict[str, MethodFile],
    records: list[dict[str, Any]],
    folder: Path,
    settings: Settings | None = None,
    report: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Measure methods at every shape and write steps.csv, phases.csv and benchmark.md to `folder`.

    A method that cannot run at a shape is reported and left out there. steps.csv is written after
    every row, so that what was measured before an end by force is kept.
    """
    from ballast.files import write_text

    settings = settings or Settings()
    version = _peft_version()
    if version is None:
        report("PEFT is not installed: its columns stay empty (pip install -e '.[test]')")
    for name in settings.methods:
        if name not in methods:
            raise SuiteError(f"benchmark.methods: {unknown('method', name, methods)}")
    chosen = [
        method
        for name, method in methods.items()
        if method.declaration.trains
        and "text" in method.declaration.applies_to
        and (not settings.methods or name in settings.methods)
    ]
    rows: list[dict[str, Any]] = []
    for shape in settings.shapes():
        for method in chosen:
            where = f"{method.name}, hidden {shape.hidden}, {shape.tokens} tokens"
            try:
                row = measure(
                    method, shape, settings.rounds, settings.generated, version is not None
                )
            except (BallastError, ValueError, RuntimeError) as error:
                report(f"{where}: left out: {error}")
                continue
            finally:
                gc.collect()  # the models of one method are gone before the next one's are made
            rows.append(row)
            report(f"{where}: {row['ours_over_base']:.2f} of the frozen base's step")
            text = pd.DataFrame(rows).to_csv(index=False, lineterminator="\n", float_format="%.5g")
            write_text(folder / "steps.csv", text)
    steps, phases = pd.DataFrame(rows), time_by_phase(records)
    if not rows:
        write_text(folder / "steps.csv", "")
    write_text(folder / "phases.csv", phases.to_csv(index=False, lineterminator="\n"))
    write_text(folder / "benchmark.md", to_markdown(steps, phases, _about(settings, version)))
    return steps


def _peft_version() -> str | None:
    try:
        import peft
    except ImportError:
        return None
    return peft.__version__
