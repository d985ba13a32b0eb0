"""A suite's forecast: its cells, its bases, and what all of it takes on a machine."""

from __future__ import annotations

import contextlib
import heapq
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ballast.errors import DataError
from ballast.files import key_of, read_sealed, write_sealed
from ballast.forecast.architecture import Network
from ballast.forecast.bases import BaseSize, base_folder, base_size
from ballast.forecast.calibrate import Calibration, Key, calibrated, likeness, usable
from ballast.forecast.holding import Footprint, footprint_guess
from ballast.forecast.machine import Machine
from ballast.forecast.need import Need, cell_need, decomposing_seconds
from ballast.forecast.prepare import Preparation, preparation
from ballast.layout import Layout
from ballast.outcome import RECORD
from ballast.records import read_path
from ballast.suite import EVALUATION, TRAINING
from ballast.tasks import Task, read_tasks

Record = Mapping[str, Any]
Settings = Mapping[str, Any]
Finished = tuple[dict[str, Any], Need, Record]
# What a job costs beside its cell's own process: Snakemake's script and the supervisor (seconds).
JOB_SECONDS = 4.0
DUE = ("missing", "stale", "rescore")
# Finished cells of other suites that are looked at where this one has none.
ELSEWHERE = 200
TRAINED = ("missing", "stale")
ALIKE = ["base", "target", "method", "variant", "rank"]


@dataclass
class BaseForecast:
    """What making a base ready takes; zeros where it is.

    disk and decompositions: bytes still to be written. preparation: also of a base that is ready.
    """

    name: str
    size: BaseSize
    network: Network
    source: dict[str, Any]
    key: str
    ready: bool
    seconds: float = 0.0
    disk: float = 0.0
    decompositions: float = 0.0
    preparation: Preparation | None = None


@dataclass
class Forecast:
    """Of a suite on a machine.

    cells: a row per cell of the plan; status, gpu, seconds (of a cell that is due, its job's own
    part included), flops, memory_mb, device_mb (of usual examples; with `most_` before, of the
    longest that its settings allow), disk_mb, checkpoint_mb, trainable, minutes and limit_mb (its
    limits). bases: by name. spread: the factor that nine of ten finished cells lie
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
    footprints: dict[int, Footprint] = field(default_factory=dict)

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
        bases = sum(base.disk + base.decompositions for base in self.bases.values()) / 1e6
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

    thorough: whether the hub is asked for bases that are not here, and methods that nobody has
    looked at yet are tried on the base in miniature, in a process of its own that takes a second or
    so for each; else both are estimated.
    """
    tasks = read_tasks(layout.tasks)
    alike = [plan[key].astype(object) for key in ALIKE]
    number = plan.groupby(alike, dropna=False, sort=False).ngroup().to_numpy()
    texts = plan["spec"].to_numpy()
    specs = {group: json.loads(texts[place]) for place, group in _firsts(number)}
    bases = _bases(specs, layout, tasks, thorough)
    known = dict(zip(plan["id"], number, strict=True))
    counted = _counted(specs, bases, layout) if thorough else _kept_counts(specs, bases, layout)
    footprints = {
        group: Footprint(**own["footprint"]) for group, own in counted.items() if own["footprint"]
    }
    # PEFT's methods have no formula; what trains of theirs is all that is held.
    trained = {group: found.held for group, found in footprints.items()}
    trained |= {group: own["trained"] for group, own in counted.items() if own["trained"]}
    counts = trained | _measured_counts(records, known)
    tokens = _tokens(records)

    def need(group: int, rescore: bool = False, longest: bool = False) -> Need:
        spec = specs[group]
        seen = None if longest else tokens.get(spec["base"])
        return cell_need(
            spec, bases[spec["base"]].network, tasks, machine, seen, counts.get(group), rescore,
            longest, footprints.get(group),
        )  # fmt: skip

    needs = {group: need(group) for group in specs}
    same = {likeness(specs[group])[0]: found for group, found in footprints.items()}
    finished = _finished(records, bases, tasks, machine, tokens, same)
    elsewhere = not finished
    if elsewhere:
        others = _elsewhere(layout, specs[0]["suite"], bases)
        finished = _finished(others, bases, tasks, machine, _tokens(others), same)
    calibration = calibrated(finished)
    cells = _table(plan, found, number, specs, needs, need, calibration)
    made = Forecast(
        cells, bases, machine, calibration.cells, elsewhere, specs=specs, footprints=footprints
    )
    made.spread = _spread(finished)
    _share(made, tasks)
    for base in bases.values():
        _decompose(made, base, layout)
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
        most = calibration.apply(spec, need(group, longest=True))
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
                "most_memory_mb": max(right.host_mb, most.host_mb),
                "most_device_mb": max(right.device_mb, most.device_mb),
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


def _bases(
    specs: dict[int, dict[str, Any]], layout: Layout, tasks: dict[str, Task], ask: bool
) -> dict[str, BaseForecast]:
    """Size, network and readiness of every base."""
    made = {}
    for spec in specs.values():
        name, key = spec["base"], spec["base_key"]
        if name in made:
            continue
        folder = base_folder(layout, name, key)
        names = {task for own in specs.values() if own["base"] == name for task in own["tasks"]}
        images = any(tasks[task].image for task in names)
        size = base_size(spec["source"], folder, ask, images)
        ready = (layout.suite(spec["suite"]) / "bases" / f"{name}.json").exists()
        made[name] = BaseForecast(name, size, size.shape, spec["source"], key, ready)
    return made


def _share(made: Forecast, tasks: dict[str, Task]) -> None:
    """Add what cells share of what makes a base ready, and the time to make it."""
    for base in made.bases.values():
        base.preparation = prepared(made, base, tasks)
        made.shared_mb += base.preparation.disk / 1e6
        if not base.ready:
            base.seconds = JOB_SECONDS + base.preparation.seconds
            base.disk = base.preparation.disk


def prepared(
    made: Forecast, base: BaseForecast, tasks: dict[str, Task], change: Settings | None = None
) -> Preparation:
    """What making a base ready takes; change: of the precisions, or evaluation's `batch_size`."""
    change = change or {}
    own = [spec for spec in made.specs.values() if spec["base"] == base.name]
    entries: dict[str, Any] = {}
    for spec in own:
        entries |= spec["tasks"]
    return preparation(
        base.source,
        base.network,
        entries,
        tasks,
        change.get("batch_size", own[0]["evaluation"]["batch_size"]),
        own[0]["base_limits"]["gpus"],
        made.machine,
        change.get("precisions", sorted({spec["training"]["precision"] for spec in own})),
        longest=True,
    )


def _decompose(made: Forecast, base: BaseForecast, layout: Layout) -> None:
    """Add singular value decompositions of a base's weights to the first cell that needs them."""
    found = {
        group: made.footprints.get(group) or footprint_guess(spec, base.network, 0.0)
        for group, spec in made.specs.items()
        if spec["base"] == base.name
    }
    wanted = {group: own for group, own in found.items() if own.decomposing}
    size = max((own.decomposed for own in wanted.values()), default=0.0)
    made.shared_mb += size / 1e6
    there = layout.decompositions(base.name, base.key)
    cells = made.cells
    rows = cells.index[cells["group"].isin(list(wanted)) & cells["status"].isin(TRAINED)]
    if len(rows) and not (there.is_dir() and any(there.iterdir())):
        first = cells.loc[rows[0], "group"]
        spec = made.specs[first]
        spent = decomposing_seconds(spec, base.network, made.machine, wanted[first])
        cells.loc[rows[0], "seconds"] += spent
        base.decompositions = size


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
    """Key of all that a cell's count and footprint depend on."""
    parts = ("method_digest", "hyper", "rank", "connector", "modules", "budget", "mixture",
             "classes")  # fmt: skip
    training = [spec["training"][part] for part in ("steps", "precision")]
    return key_of(config, [spec.get(part) for part in parts], training)


def _asked(
    specs: dict[int, dict[str, Any]], bases: dict[str, BaseForecast]
) -> dict[int, tuple[str, dict[str, Any]]]:
    """By group: the key of its count, and what has to be counted."""
    return {
        group: (_count_key(spec, size.config), {"config": size.config, "spec": spec})
        for group, spec in specs.items()
        if (size := bases[spec["base"]].size).config is not None and spec["family"] != "post-hoc"
    }


def _kept(layout: Layout) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The file of counts, and what it holds: nothing if damaged, as they can be made again."""
    path = layout.shared / "footprints.json"
    try:
        return path, read_sealed(path)
    except DataError:
        return path, {}


def _kept_counts(
    specs: dict[int, dict[str, Any]], bases: dict[str, BaseForecast], layout: Layout
) -> dict[int, dict[str, Any]]:
    """Counts that an earlier forecast has kept."""
    _, kept = _kept(layout)
    if not kept:
        return {}
    asked = _asked(specs, bases)
    return {group: kept[key] for group, (key, _) in asked.items() if key in kept}


def _counted(
    specs: dict[int, dict[str, Any]], bases: dict[str, BaseForecast], layout: Layout
) -> dict[int, dict[str, Any]]:
    """Counts and footprints by the methods themselves, kept for the next time."""
    from ballast.forecast.counting import count_in_child

    asked = _asked(specs, bases)
    path, kept = _kept(layout)
    new = {key: cell for key, cell in asked.values() if key not in kept}
    if new:
        counts = count_in_child(list(new.values()), layout.methods)
        kept |= dict(zip(new, counts, strict=True))
        with contextlib.suppress(OSError):  # a forecast needs no room to write to
            write_sealed(path, kept)
    return {group: kept[key] for group, (key, _) in asked.items()}


def _finished(
    records: Iterable[Record],
    bases: Mapping[str, BaseForecast],
    tasks: Mapping[str, Task],
    machine: Machine,
    tokens: Mapping[str, Mapping[str, float]],
    footprints: Mapping[Key, Footprint],
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
            need = cell_need(
                spec, base.network, tasks, machine, tokens.get(base.name), counted,
                footprint=footprints.get(likeness(spec)[0]),
            )  # fmt: skip
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
