"""A suite's forecast: its cells, its bases, and what all of it takes on a machine."""

from __future__ import annotations

import heapq
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ballast.errors import DataError
from ballast.files import key_of, read_json, write_json
from ballast.forecast.architecture import Network
from ballast.forecast.bases import BaseSize, base_folder, base_size
from ballast.forecast.calibrate import Calibration, calibrated, usable
from ballast.forecast.machine import Machine
from ballast.forecast.need import Need, cell_need
from ballast.forecast.prepare import preparation
from ballast.layout import Layout
from ballast.outcome import RECORD
from ballast.records import read_path
from ballast.suite import EVALUATION, TRAINING
from ballast.tasks import Task, read_tasks

Record = Mapping[str, Any]
Finished = tuple[dict[str, Any], Need, Record]
# What a job costs beside its cell's own process: Snakemake's script and the supervisor (seconds).
JOB_SECONDS = 4.0
DUE = ("missing", "stale", "rescore")
# Finished cells of other suites that are looked at where this one has none.
ELSEWHERE = 200
ALIKE = ["base", "target", "method", "variant", "rank"]


@dataclass
class BaseForecast:
    """What making a base ready takes; zeros where it is."""

    name: str
    size: BaseSize
    network: Network
    source: dict[str, Any]
    key: str
    ready: bool
    seconds: float = 0.0
    disk: float = 0.0


@dataclass
class Forecast:
    """Of a suite on a machine.

    cells: a row per cell of the plan; status, gpu, seconds (of a cell that is due, its job's own
    part included), flops, memory_mb, device_mb, disk_mb, checkpoint_mb, trainable, minutes and
    limit_mb (its limits). bases: by name. spread: the factor that nine of ten finished cells lie
    within when they are forecast from the other half; finished: how many they are; elsewhere:
    whether they are of other suites.
    """

    cells: pd.DataFrame
    bases: dict[str, BaseForecast]
    machine: Machine
    finished: int = 0
    elsewhere: bool = False
    spread: float | None = None
    shared_mb: float = 0.0
    specs: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def due(self) -> pd.DataFrame:
        return self.cells[self.cells["status"].isin(DUE)]

    def hours(self, gpu: bool) -> float:
        """Core-hours (without GPU) or GPU-hours of what is due, bases included."""
        due = self.due
        total = float((due["seconds"] * due["slots"])[due["gpu"] == gpu].sum())
        total += sum(base.seconds for base in self.bases.values()) if not gpu else 0.0
        return total / 3600

    def wall_seconds(self) -> float:
        """Wall time of what is due on the machine's cores and GPUs."""
        due = self.due
        bases = [base.seconds for base in self.bases.values()]
        ahead = packed(bases, self.machine.cores)
        cores = max(1, self.machine.cores)
        gpus = max(1, self.machine.gpus)
        on_gpu = due["gpu"].to_numpy(bool)
        walls = [
            packed(due["seconds"][mask].tolist(), slots)
            for mask, slots in ((~on_gpu, cores), (on_gpu, min(gpus, cores)))
        ]
        return ahead + max(walls)

    @property
    def disk_mb(self) -> float:
        """MB that the suite will hold when it is finished, shared parts included."""
        return float(self.cells["disk_mb"].sum()) + self.shared_mb

    @property
    def disk_due_mb(self) -> float:
        """MB that are still to be written, with the checkpoints of the cells that run at once."""
        due = self.due
        slots = max(1, self.machine.gpus if due["gpu"].any() else self.machine.cores)
        running = due["checkpoint_mb"].nlargest(slots).sum()
        bases = sum(base.disk for base in self.bases.values()) / 1e6
        missing = due[due["status"] == "missing"]
        return float(missing["disk_mb"].sum() + running) + bases


def forecast_suite(
    plan: pd.DataFrame,
    found: pd.Series,
    records: Sequence[Record],
    layout: Layout,
    machine: Machine,
    thorough: bool = False,
) -> Forecast:
    """Forecast a plan's cells; `found` their status by id, `records` those of the suite.

    thorough: whether the hub is asked for bases that are not here, and trainable parameters that
    nobody has counted yet are counted by the methods' own formulas, in a process of its own that
    takes some seconds; else both are estimated.
    """
    tasks = read_tasks(layout.tasks)
    alike = [plan[key].astype(object) for key in ALIKE]
    number = plan.groupby(alike, dropna=False, sort=False).ngroup().to_numpy()
    texts = plan["spec"].to_numpy()
    specs = {group: json.loads(texts[place]) for place, group in _firsts(number)}
    bases = _bases(specs, layout, thorough)
    known = dict(zip(plan["id"], number, strict=True))
    counts = _measured_counts(records, known)
    if thorough:
        unknown = {group: spec for group, spec in specs.items() if group not in counts}
        counts = _counted(unknown, bases, layout) | counts
    else:
        counts = _kept_counts(specs, bases, layout) | counts
    tokens = _tokens(records)

    def need(group: int, rescore: bool = False) -> Need:
        spec = specs[group]
        return cell_need(
            spec, bases[spec["base"]].network, tasks, machine, tokens.get(spec["base"]),
            counts.get(group), rescore,
        )  # fmt: skip

    needs = {group: need(group) for group in specs}
    finished = _finished(records, bases, tasks, machine, tokens)
    elsewhere = not finished
    if elsewhere:
        others = _elsewhere(layout, specs[0]["suite"], bases)
        finished = _finished(others, bases, tasks, machine, _tokens(others))
    calibration = calibrated(finished)
    cells = _table(plan, found, number, specs, needs, need, calibration)
    made = Forecast(cells, bases, machine, calibration.cells, elsewhere, specs=specs)
    made.spread = _spread(finished)
    _share(made, specs, tasks)
    return made


def _table(
    plan: pd.DataFrame,
    found: pd.Series,
    number: Any,
    specs: dict[int, dict[str, Any]],
    needs: dict[int, Need],
    need: Any,
    calibration: Calibration,
) -> pd.DataFrame:
    rows = []
    for group, spec in specs.items():
        right = calibration.apply(spec, needs[group])
        again = calibration.apply(spec, need(group, rescore=True)).total
        limits = spec["limits"]
        rows.append(
            {
                "group": group,
                "gpu": right.gpu,
                # A GPU cell holds its GPUs, another one its threads.
                "slots": limits["gpus"] if right.gpu else spec["training"]["threads"],
                "whole": right.total + JOB_SECONDS,
                "again": again + JOB_SECONDS,
                "flops": right.flops,
                "memory_mb": right.host_mb,
                "device_mb": right.device_mb,
                "disk_mb": right.disk / 1e6,
                "checkpoint_mb": right.checkpoint / 1e6,
                "trainable": right.trainable,
                "minutes": limits["minutes"],
                "limit_mb": limits["memory_mb"],
            }
        )
    table = plan[["id", *ALIKE, "posthoc"]].assign(group=number, status=found.to_numpy())
    table = table.merge(pd.DataFrame(rows), on="group", how="left")
    table["seconds"] = table["whole"].where(table["status"] != "rescore", table["again"])
    table.loc[~table["status"].isin(DUE), "seconds"] = 0.0
    return table


def _firsts(number: Any) -> list[tuple[int, int]]:
    """(place, group) of the first cell of every group of cells that differ in their seed alone."""
    seen: dict[int, int] = {}
    for place, group in enumerate(number.tolist()):
        seen.setdefault(group, place)
    return [(place, group) for group, place in seen.items()]


def _bases(specs: dict[int, dict[str, Any]], layout: Layout, ask: bool) -> dict[str, BaseForecast]:
    """Size, network and readiness of every base."""
    made = {}
    for spec in specs.values():
        name, key = spec["base"], spec["base_key"]
        if name in made:
            continue
        folder = base_folder(layout, name, key)
        size = base_size(spec["source"], folder, ask)
        ready = (layout.suite(spec["suite"]) / "bases" / f"{name}.json").exists()
        made[name] = BaseForecast(name, size, size.shape, spec["source"], key, ready)
    return made


def _share(made: Forecast, specs: dict[int, dict[str, Any]], tasks: dict[str, Task]) -> None:
    """Add what cells share: bases, features, decompositions, and the time to make them."""
    for base in made.bases.values():
        own = [spec for spec in specs.values() if spec["base"] == base.name]
        entries: dict[str, Any] = {}
        for spec in own:
            entries |= spec["tasks"]
        taken = preparation(
            base.source,
            base.network,
            entries,
            tasks,
            own[0]["evaluation"]["batch_size"],
            own[0]["limits"]["gpus"],
            made.machine,
            {spec["method"] for spec in own},
            precisions=sorted({spec["training"]["precision"] for spec in own}),
        )
        made.shared_mb += taken.disk / 1e6
        if not base.ready:
            base.seconds, base.disk = JOB_SECONDS + taken.seconds, taken.disk


def packed(seconds: Sequence[float], slots: int) -> float:
    """Wall time of jobs that are started in this order, each on the slot that is free first."""
    ends = [0.0] * max(1, slots)
    for each in seconds:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends)


def _tokens(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Tokens of a training example by base and target, as finished cells counted them."""
    seen: dict[tuple[str, str], list[float]] = {}
    for record in records:
        training, who = record["settings"]["training"], record["identity"]
        if record["status"] == "ok" and training and record["costs"]["tokens"]:
            examples = training["steps"] * training["accumulation"] * training["batch_size"]
            where = who["base"], who["target"]
            seen.setdefault(where, []).append(record["costs"]["tokens"] / examples)
    found: dict[str, dict[str, float]] = {}
    for (base, target), values in seen.items():
        found.setdefault(base, {})[target] = statistics.median(values)
    return found


def _measured_counts(records: Sequence[Record], known: Mapping[str, int]) -> dict[int, float]:
    return {
        known[record["id"]]: record["costs"]["trainable_parameters"]
        for record in records
        if record["id"] in known and record["costs"]["trainable_parameters"]
    }


def _count_key(spec: Mapping[str, Any], config: Any) -> str:
    """Key of all that a cell's trainable count depends on."""
    parts = ("method_digest", "hyper", "rank", "connector", "modules", "budget", "mixture")
    return key_of(config, [spec.get(part) for part in parts], spec["training"]["steps"])


def _asked(
    specs: dict[int, dict[str, Any]], bases: dict[str, BaseForecast]
) -> dict[int, tuple[str, dict[str, Any]]]:
    """By group: the key of its count, and what has to be counted."""
    return {
        group: (_count_key(spec, size.config), {"config": size.config, "spec": spec})
        for group, spec in specs.items()
        if (size := bases[spec["base"]].size).config is not None and spec["family"] != "post-hoc"
    }


def _kept(layout: Layout) -> tuple[Path, dict[str, int | None]]:
    path = layout.shared / "counts.json"
    return path, read_json(path) if path.exists() else {}


def _kept_counts(
    specs: dict[int, dict[str, Any]], bases: dict[str, BaseForecast], layout: Layout
) -> dict[int, float]:
    """Counts that an earlier forecast has kept."""
    _, kept = _kept(layout)
    if not kept:
        return {}
    asked = _asked(specs, bases)
    return {group: kept[key] for group, (key, _) in asked.items() if kept.get(key)}


def _counted(
    specs: dict[int, dict[str, Any]], bases: dict[str, BaseForecast], layout: Layout
) -> dict[int, float]:
    """Counts by the methods' own formulas, kept for the next time."""
    from ballast.forecast.counting import count_in_child

    asked = _asked(specs, bases)
    path, kept = _kept(layout)
    new = {key: cell for key, cell in asked.values() if key not in kept}
    if new:
        counts = count_in_child(list(new.values()), layout.methods)
        kept |= dict(zip(new, counts, strict=True))
        write_json(path, kept)
    return {group: kept[key] for group, (key, _) in asked.items() if kept.get(key)}


def _finished(
    records: Iterable[Record],
    bases: Mapping[str, BaseForecast],
    tasks: Mapping[str, Task],
    machine: Machine,
    tokens: Mapping[str, Mapping[str, float]],
) -> list[Finished]:
    """Finished cells of these bases, with what shapes alone say of them."""
    found = []
    for record in records:
        base = bases.get(record["identity"]["base"])
        if base is None or record["keys"]["base"] != base.key or record["status"] != "ok":
            continue
        if set(record["tasks"]) <= set(tasks):
            spec = spec_of_record(record)
            counted = record["costs"]["trainable_parameters"]
            need = cell_need(spec, base.network, tasks, machine, tokens.get(base.name), counted)
            found.append((spec, need, record))
    return found


def spec_of_record(record: Record) -> dict[str, Any]:
    """What `cell_need` reads of a cell's spec, from its record."""
    settings = record["settings"]
    training = TRAINING | (settings["training"] or {})
    device = str(record["provenance"].get("device", "cpu"))
    return {
        **record["identity"],
        "family": record["method"]["family"],
        "training": training,
        "evaluation": EVALUATION | settings["evaluation"],
        "modules": settings["modules"],
        "connector": settings["connector"],
        "limits": {"gpus": int(device.startswith("cuda"))},
        "tasks": {
            name: {
                "role": task["role"],
                "sizes": {"test": record["scores"][name]["n"]},
                "max_length": training["max_length"] if task["role"] == "target" else None,
            }
            for name, task in record["tasks"].items()
        },
    }


def _elsewhere(layout: Layout, suite: str, bases: Iterable[str]) -> list[Record]:
    """Records of other suites here, evenly many of all that begin with a base's name."""
    names = tuple(f"{base}." for base in bases)
    paths = [
        path / RECORD
        for folder in sorted(layout.results.glob("*/cells"))
        if folder.parent.name != suite
        for path in sorted(folder.iterdir())
        if path.name.startswith(names)
    ]
    found = []
    for path in paths[:: max(1, len(paths) // ELSEWHERE)]:
        try:
            found.append(read_path(path))
        except DataError:  # damaged, of an older format, or not finished
            continue
    return found


def _spread(finished: Sequence[Finished]) -> float | None:
    """The factor within which nine of ten finished cells took what the other half of them says."""
    if len(finished) < 10:
        return None
    off = []
    for half in (0, 1):
        others = calibrated(finished[1 - half :: 2])
        for spec, need, record in finished[half::2]:
            total = record["costs"]["seconds"].get("total")
            if usable(record, need.gpu) and total:
                ratio = others.apply(spec, need).total / total
                off.append(max(ratio, 1 / ratio))
    return statistics.quantiles(off, n=10)[-1] if len(off) > 1 else None
