"""The plan: one row per cell of a suite, a pandas table made once per suite content."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ballast import budget, sources, versions
from ballast.contents import named_files
from ballast.declare import MethodFile
from ballast.errors import DataError, SuiteError, unknown
from ballast.files import check_sums, key_of, key_of_files, replacing, sha256_file, write_sums
from ballast.forecast.bases import BaseSize, base_folder, base_size
from ballast.layout import Layout, real_data
from ballast.limits import base_limits, cell_limits
from ballast.rates import chosen_rates
from ballast.suite import Suite, applies, single_targets
from ballast.tasks import read_tasks

COLUMNS = (
    "id", "base", "target", "method", "variant", "rank", "seed", "posthoc", "parents",
    "base_key", "data_key", "train_key", "eval_key", "spec",
)  # fmt: skip

VISION = "vision-language"

# What a plan is made by, and where the sources of tasks and bases name files.
PLANNERS = (
    "budget", "contents", "declare", "limits", "plan", "rates", "sources", "suite", "tasks", "tune",
    "versions",
)  # fmt: skip
FILES = ("path", "train", "test", "images", "model", "tokenizer")


def base_key(spec: dict[str, Any]) -> str:
    """Key of a base: the code and seed that pretrain it, or the hub's id, revision and files."""
    source = spec["source"]
    parts: list[Any] = [source]
    if "world" in source:
        parts += [sources.world_key(source["world"], base=True), spec.get("gate")]
    if "path" in source:
        parts.append(_folder_key(real_data(source["path"])))
    local = {} if "hub" in source else source.get("llama2c", {})
    for path in local.values():
        parts.append(key_of_files(real_data(path)))
    return key_of(*parts, length=12)


def _folder_key(folder: Path) -> str:
    """Content key of a base's folder: whole bytes of small files, size and ends of large ones."""
    parts = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        size = path.stat().st_size
        if size <= 1 << 26:
            parts.append([path.name, key_of_files(path)])
            continue
        with path.open("rb") as stream:
            head = stream.read(1 << 20)
            stream.seek(-(1 << 20), 2)
            parts.append([path.name, size, key_of(head.hex(), stream.read().hex())])
    return key_of(parts)


@dataclass(frozen=True)
class _Base:
    """What the cells of one base share."""

    name: str
    spec: dict[str, Any]
    key: str
    # By precision of its cells, then by task: role, count and keys.
    tasks: dict[str, dict[str, dict[str, Any]]]
    size: BaseSize
    limits: dict[str, Any]  # of making it ready


def _end(spec: dict[str, Any]) -> dict[str, str]:
    """The base's own end of a response, where it names one."""
    return {"end": spec["end"]} if "end" in spec else {}


def _task_entries(
    suite: Suite, base: str, spec: dict[str, Any], precision: str
) -> dict[str, dict[str, Any]]:
    """Roles, item counts and keys of every task that a base is scored or trained on.

    precision: in which the untouched base is scored and its vision tower read; the keys of fp32 do
    not name it.
    """
    limits = suite.config["evaluation"]
    roles = [(name, "upstream") for name in spec["upstream"]]
    roles += [(name, "probe") for name in spec.get("probes", [])]
    trainings = {
        name: training
        for target, training in suite.targets(base).items()
        for name in suite.target_tasks(base, target)
    }
    roles += [(name, "target") for name in trainings]
    template = [spec.get("template", "chat"), spec.get("delimiter"), *_end(spec).values()]
    lower = [] if precision == "fp32" else [precision]
    entries = {}
    for name, role in roles:
        task = suite.tasks[name]
        count = limits["downstream" if role == "target" else "upstream"]
        if task.image and task.generates:
            count = min(count, limits["generation"])
        training = trainings.get(name, {})
        sizes = {"test": count}
        if role == "target":
            sizes |= {"train": training["examples"], "validation": limits["validation"]}
        data = [
            sources.digest(task.source),
            template,
            training.get("max_length"),
            versions.TRAIN,
        ]
        if task.encoder:
            data.append([task.output_type, task.classes])
        features = lower if task.image else []
        # Rows of others that stand on both sides leave the training side, so that its content
        # depends on how many items are held out; generated rows never do.
        counted = sizes if task.source["reader"] != "world" else training.get("examples")
        entries[name] = {
            "role": role,
            "sizes": sizes,
            "max_length": training.get("max_length"),
            "data_key": key_of(*data, sizes, task.image, *features, length=12),
            "train_key": key_of(*data, counted, *features, length=12),
            "eval_key": key_of(
                data[:2],
                count,
                task.digest,
                versions.EVALUATION,
                limits["batch_size"],
                *lower,
                length=12,
            ),
        }
    return entries


def make_plan(suite: Suite, layout: Layout | None = None) -> pd.DataFrame:
    """All cells of a suite, trained ones first; columns as in `COLUMNS`.

    layout: where bases that are ready lie; their limits follow from their files.
    Raises SuiteError for a post-hoc parent that is not in the suite.
    """
    rates = chosen_rates(suite)
    rows: list[dict[str, Any]] = []
    for name, spec in suite.config["bases"].items():
        try:
            base = _base(suite, name, spec, layout)
        except DataError as error:
            raise SuiteError(f"bases.{name}: {error}") from None
        trained = {t: _trained(suite, base, t, rates) for t in suite.targets(name)}
        for target, block in trained.items():
            rows += block + _posthoc(suite, base, target, trained)
    plan = pd.DataFrame(rows, columns=list(COLUMNS))
    plan["rank"] = plan["rank"].astype("Int64")
    plan.attrs["left_out"] = [
        f"{label} on {base}" for base in suite.config["bases"] for label in _left_out(suite, base)
    ]
    if not plan["id"].is_unique:
        twice = plan.loc[plan["id"].duplicated(), "id"].iloc[0]
        raise SuiteError(f"two cells are the same: {twice}; are two variants equal?")
    return plan


def _base(suite: Suite, name: str, spec: dict[str, Any], layout: Layout | None) -> _Base:
    key, trainings = base_key(spec), list(suite.targets(name).values())
    tasks = {
        precision: _task_entries(suite, name, spec, precision)
        for precision in dict.fromkeys(training["precision"] for training in trainings)
    }
    images = any(suite.tasks[task].image for task in next(iter(tasks.values())))
    size = base_size(spec["source"], layout and base_folder(layout, name, key), images=images)
    limits = base_limits(
        spec["source"],
        next(iter(tasks.values())),
        trainings,
        suite.config["evaluation"]["batch_size"],
        size,
        suite.tasks,
        suite.limits(name),
    )
    return _Base(name, spec, key, tasks, size, limits)


def _left_out(suite: Suite, base: str) -> list[str]:
    """Methods, and variants as method+variant, that the base has no cells of though the suite did
    not keep them from it."""
    here = set(suite.targets(base))
    return [
        f"{name}+{variant}" if variant else name
        for name, chosen in suite.chosen().items()
        for variant, item in _variants(suite.methods[name], chosen)
        if here & set(item.get("targets", here)) and not _fits(suite, base, name, item)
    ]


def _fits(suite: Suite, base: str, method: str, item: dict[str, Any]) -> bool:
    """Whether a base can have cells of a method's variant: one with a connector needs one."""
    connector = item.get("connector", "frozen") != "frozen"
    if connector and suite.kind(base) != VISION:
        return False
    return applies(suite, suite.methods[method], base)


def _variants(method: MethodFile, spec: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The method as set for the suite, and its variants, each a change of that."""
    common = {k: spec[k] for k in ("connector", "learning_rate", "targets") if k in spec}
    found = [("", common | {"set": spec.get("set", {})})]
    for name, item in spec.get("variants", {}).items():
        merged = common | {k: v for k, v in item.items() if k != "set"}
        found.append((name, merged | {"set": spec.get("set", {}) | item.get("set", {})}))
    return found


def _trained(
    suite: Suite, base: _Base, target: str, rates: dict[tuple[Any, ...], float]
) -> list[dict[str, Any]]:
    rows = []
    for name, chosen in suite.chosen().items():
        method = suite.methods[name]
        if not method.declaration.trains:
            continue
        sizes = _sizes(suite, method, chosen)
        for plain, item in _variants(method, chosen):
            if target not in item.get("targets", [target]):
                continue
            if not _fits(suite, base.name, name, item):
                continue
            for rank, asked in sizes:
                variant = "-".join(part for part in (plain, asked and budget.label(asked)) if part)
                where = (base.name, target, name, variant, rank)
                rate, origin = item.get("learning_rate"), "suite"
                if rate is None:
                    rate, origin = rates.get(where), "tuned"
                if rate is None:
                    rate, origin = suite.config["tuning"]["start"].get(name), "suite's start"
                if rate is None:
                    settings = method.settings(item["set"], suite.folders)
                    rate, origin = method.learning_rate(settings)
                for seed in suite.seeds(base.name):
                    spec = _spec(suite, base, target, method, variant, rank, seed, item)
                    spec |= {"learning_rate": rate, "learning_rate_source": origin}
                    if asked:
                        spec["budget"] = asked
                    rows.append(_row(suite, base, target, method, spec, []))
    return rows


def _sizes(
    suite: Suite, method: MethodFile, chosen: dict[str, Any]
) -> list[tuple[int | None, str | int | None]]:
    """(rank, budget) of a method's cells; one of the two is None, both where it has no size."""
    own = "ranks" in chosen or "budgets" in chosen
    ranks = chosen.get("ranks", [] if own else suite.config["ranks"])
    budgets = chosen.get("budgets", [] if own else suite.config["budgets"])
    declaration = method.declaration
    found: list[tuple[int | None, str | int | None]] = []
    if declaration.rank:
        found += [(rank, None) for rank in ranks]
    elif ranks or not (budgets and declaration.size):
        found.append((None, None))
    if declaration.rank or declaration.size:
        found += [(None, text) for text in budgets]
    return found


def _spec(
    suite: Suite,
    base: _Base,
    target: str,
    method: MethodFile,
    variant: str,
    rank: int | None,
    seed: int,
    item: dict[str, Any],
) -> dict[str, Any]:
    """The frozen spec of a cell: everything that a person chose and that affects its numbers."""
    declaration = method.declaration
    members = suite.target_tasks(base.name, target)
    training = suite.targets(base.name)[target]
    spec = {
        "suite": suite.name,
        "base": base.name,
        "target": target,
        "method": method.name,
        "variant": variant,
        "rank": rank,
        "seed": seed,
        "hyper": method.settings(item["set"], suite.folders),
        "connector": item.get("connector", "frozen"),
        "modules": suite.config["modules"],
        "training": training,
        "merges": declaration.merges,
        "family": declaration.family,
        "title": declaration.title,
        "base_limits": base.limits,
        "curves": suite.config["curves"],
        "evaluation": suite.config["evaluation"],
        "source": base.spec["source"],
        "gate": base.spec.get("gate"),
        "template": base.spec.get("template", "chat"),
        "delimiter": base.spec.get("delimiter"),
        **_end(base.spec),
        "base_key": base.key,
        **({"mixture": members} if members != [target] else {}),
        **_classes(suite, members),
        "tasks": {
            name: entry
            for name, entry in base.tasks[training["precision"]].items()
            if entry["role"] != "target" or name in members
        },
    }
    return spec | {"limits": cell_limits(spec, base.size, suite.tasks, suite.limits(base.name))}


def _classes(suite: Suite, members: list[str]) -> dict[str, list[list[Any]]]:
    """How many classes each task of an encoder's target has, in their order in its head."""
    found = [[name, len(suite.tasks[name].classes)] for name in members]
    return {"classes": found} if all(count for _, count in found) else {}


# Settings that change neither a trained weight nor a score.
_IDLE = (
    "title", "family", "limits", "base_limits", "learning_rate_source", "tasks", "evaluation",
    "gate", "curves",
)  # fmt: skip
_IDLE_TRAINING = ("checkpoint_every", "threads", "device")


def settings_that_count(spec: dict[str, Any]) -> dict[str, Any]:
    """The settings of a cell's spec that its trained weights depend on."""
    settings = {k: v for k, v in spec.items() if k not in _IDLE}
    settings["training"] = {
        k: v for k, v in settings["training"].items() if k not in _IDLE_TRAINING
    }
    return settings


def _row(
    suite: Suite,
    base: _Base,
    target: str,
    method: MethodFile,
    spec: dict[str, Any],
    parents: list[dict[str, Any]],
) -> dict[str, Any]:
    settings = settings_that_count(spec)
    spec = spec | {"parents": [parent["id"] for parent in parents]}
    settings["parents"] = spec["parents"]
    entries = base.tasks[spec["training"]["precision"]]
    label = spec["method"] + (f"-r{spec['rank']}" if spec["rank"] else "")
    label += f"+{spec['variant']}" if spec["variant"] else ""
    slug = ".".join([spec["base"], target, label, f"s{spec['seed']}"])
    data = [entries[name]["train_key"] for name in suite.target_tasks(base.name, target)]
    train_key = key_of(
        settings,
        method.digest,
        versions.TRAIN,
        *data,
        [parent["train_key"] for parent in parents],
    )
    scored = {name: entry["eval_key"] for name, entry in spec["tasks"].items()}
    return {
        "id": f"{slug}-{key_of(settings, length=8)}",
        "base": spec["base"],
        "target": target,
        "method": spec["method"],
        "variant": spec["variant"],
        "rank": spec["rank"],
        "seed": spec["seed"],
        "posthoc": not method.declaration.trains,
        "parents": " ".join(spec["parents"]),
        "base_key": base.key,
        "data_key": key_of({k: v["data_key"] for k, v in entries.items()}, length=12),
        "train_key": train_key,
        "eval_key": key_of(scored, suite.config["evaluation"]["drift"]),
        "spec": json.dumps(spec | {"method_digest": method.digest}, sort_keys=True),
    }


def parent_label(row: dict[str, Any]) -> str:
    """How a suite names a cell as a parent: method, method-r8 or method-r8+variant."""
    label = row["method"] + (f"-r{row['rank']}" if row["rank"] else "")
    return label + (f"+{row['variant']}" if row["variant"] else "")


def _posthoc(
    suite: Suite, base: _Base, target: str, trained: dict[str, list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Cells of a target that edit finished parents: its own, or those of all single targets."""
    rows = []
    known = {
        (row["target"], parent_label(row), row["seed"]): row
        for block in trained.values()
        for row in block
    }
    for name, chosen in suite.chosen().items():
        method = suite.methods[name]
        if method.declaration.trains or not applies(suite, method, base.name):
            continue
        for parent in chosen.get("parents", method.declaration.parents):
            # A parent that runs on other targets alone has no such cell here; that is no mistake.
            having = {other for other, label, _ in known if label == parent}
            if having and target not in having:
                continue
            targets = [target]
            if method.declaration.several_targets:
                targets = [t for t in single_targets(suite, base.name) if t in having]
                if having and (len(targets) < 2 or target not in targets):
                    continue
            for variant, item in _variants(method, chosen):
                if target not in item.get("targets", [target]):
                    continue
                for seed in suite.seeds(base.name):
                    sources = [known.get((other, parent, seed)) for other in targets]
                    if None in sources or not sources:
                        if _is_left_out(suite, base.name, parent):
                            continue
                        labels = {label for _, label, _ in known}
                        raise SuiteError(
                            f"methods.{name}.parents: "
                            f"{unknown('trained cell of this suite', parent, labels)}"
                        )
                    title = "-".join(part for part in ("of", parent, variant) if part)
                    spec = _spec(suite, base, target, method, title, None, seed, item)
                    rows.append(_row(suite, base, target, method, spec, sources))
    return rows


def _is_left_out(suite: Suite, base: str, parent: str) -> bool:
    """Whether a parent is a cell that this base does not have but another one may."""
    name, variant = re.fullmatch(r"(.+?)(?:-r\d+)?(?:\+(.+))?", parent).groups(default="")
    return bool({name, f"{name}+{variant}"} & set(_left_out(suite, base)))


def plan_key(config: dict[str, Any], layout: Layout, folder: Path) -> str:
    """Key of all that a plan depends on: the suite, methods, tasks, rates, engine and data.

    Data count by their files' sizes and times here, so that a run starts quickly; the plan itself
    reads what is in them.
    """
    rates = config.get("learning_rates")
    package = Path(__file__).parent
    paths = [layout.methods, layout.tasks]
    paths += [package / name for name in ("worlds", "bases", "forecast")]
    paths += [package / f"{name}.py" for name in PLANNERS]
    paths += [folder / rates] if isinstance(rates, str) and (folder / rates).is_file() else []
    files = [p for path in paths for p in ([path] if path.is_file() else path.rglob("*"))]
    files = sorted(p for p in files if p.is_file() and p.suffix in (".py", ".yaml", ".csv"))
    named = [[str(p), sha256_file(p)] for p in named_files(config, (folder, folder.parent))]
    return key_of(config, _data_stamp(config, layout), key_of_files(*files), *named)


def _data_stamp(config: dict[str, Any], layout: Layout) -> list[Any]:
    """Sizes and times of the files that tasks and bases name: a changed one makes the plan anew."""
    named = [task.source for task in read_tasks(layout.tasks).values()]
    for base in config["bases"].values():
        named += [base["source"], base["source"].get("llama2c", {})]
    stamp = []
    for text in sorted({source[key] for source in named for key in FILES if key in source}):
        try:
            path = real_data(text)
        except DataError:
            continue
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        stats = [file.stat() for file in files]
        stamp.append([str(path), [[s.st_size, s.st_mtime_ns] for s in stats]])
    return stamp


def write_plan(plan: pd.DataFrame, path: Path) -> None:
    """Write a plan atomically as parquet, and its checksum beside it."""
    with replacing(path) as temporary:
        plan.to_parquet(temporary, index=False)
    write_sums(path.parent, [path], sums_of(path))


def sums_of(path: Path) -> str:
    """Name of the file beside a plan that has its checksum."""
    return f".{path.name}.json"


def row_of(path: Path, cell: str) -> dict[str, Any]:
    """A cell's row of a plan's file. Raises SystemExit if the plan has no such cell."""
    plan = read_plan(path)
    if cell not in plan.index:
        raise SystemExit(f"{cell}: no such cell in {path}")
    return plan.loc[cell].to_dict()


def read_plan(path: Path) -> pd.DataFrame:
    """Read a plan; cells by id as the index. Raises Damaged if it is not as it was written."""
    check_sums(path.parent, sums_of(path))
    return pd.read_parquet(path).set_index("id", drop=False)
