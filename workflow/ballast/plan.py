"""The plan: one row per cell of a suite, a pandas table made once per suite content."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ballast import sources, versions
from ballast.declare import MethodFile
from ballast.errors import DataError, SuiteError, unknown
from ballast.files import key_of, key_of_files, replacing
from ballast.layout import Layout, real_data
from ballast.rates import chosen_rates
from ballast.suite import Suite
from ballast.tasks import read_tasks

COLUMNS = (
    "id", "base", "target", "method", "variant", "rank", "seed", "posthoc", "parents",
    "base_key", "data_key", "train_key", "eval_key", "spec",
)  # fmt: skip

# What a plan is made by, and where the sources of tasks and bases name files.
PLANNERS = ("declare", "plan", "rates", "sources", "suite", "tasks", "tune", "versions")
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
    tasks: dict[str, dict[str, Any]]  # by task: role, count and keys


def _end(spec: dict[str, Any]) -> dict[str, str]:
    """The base's own end of a response, where it names one."""
    return {"end": spec["end"]} if "end" in spec else {}


def _task_entries(suite: Suite, base: str, spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Roles, item counts and keys of every task that a base is scored or trained on."""
    limits = suite.config["evaluation"]
    roles = [(name, "upstream") for name in spec["upstream"]]
    roles += [(name, "probe") for name in spec.get("probes", [])]
    roles += [(name, "target") for name in suite.targets(base)]
    template = [spec.get("template", "chat"), spec.get("delimiter"), *_end(spec).values()]
    entries = {}
    for name, role in roles:
        task = suite.tasks[name]
        count = limits["downstream" if role == "target" else "upstream"]
        if task.image and task.generates:
            count = min(count, limits["generation"])
        training = suite.targets(base).get(name, {})
        sizes = {"test": count}
        if role == "target":
            sizes |= {"train": training["examples"], "validation": limits["validation"]}
        data = [
            sources.digest(task.source),
            template,
            training.get("max_length"),
            versions.TRAIN,
        ]
        # Rows of others that stand on both sides leave the training side, so that its content
        # depends on how many items are held out; generated rows never do.
        counted = sizes if task.source["reader"] != "world" else training.get("examples")
        entries[name] = {
            "role": role,
            "sizes": sizes,
            "max_length": training.get("max_length"),
            "data_key": key_of(*data, sizes, task.image, length=12),
            "train_key": key_of(*data, counted, length=12),
            "eval_key": key_of(
                data[:2], count, task.digest, versions.EVALUATION, limits["batch_size"], length=12
            ),
        }
    return entries


def make_plan(suite: Suite) -> pd.DataFrame:
    """All cells of a suite, trained ones first; columns as in `COLUMNS`.

    Raises SuiteError for a post-hoc parent that is not in the suite.
    """
    rates = chosen_rates(suite)
    rows: list[dict[str, Any]] = []
    for name, spec in suite.config["bases"].items():
        try:
            base = _Base(name, spec, base_key(spec), _task_entries(suite, name, spec))
        except DataError as error:
            raise SuiteError(f"bases.{name}: {error}") from None
        for target in suite.targets(name):
            block = _trained(suite, base, target, rates)
            rows += block + _posthoc(suite, base, target, block)
    plan = pd.DataFrame(rows, columns=list(COLUMNS))
    plan["rank"] = plan["rank"].astype("Int64")
    if not plan["id"].is_unique:
        twice = plan.loc[plan["id"].duplicated(), "id"].iloc[0]
        raise SuiteError(f"two cells are the same: {twice}; are two variants equal?")
    return plan


def _variants(method: MethodFile, spec: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The method as set for the suite, and its variants, each a change of that."""
    common = {k: spec[k] for k in ("connector", "learning_rate") if k in spec}
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
        ranks = chosen.get("ranks", suite.config["ranks"]) if method.declaration.rank else [None]
        for variant, item in _variants(method, chosen):
            for rank in ranks:
                where = (base.name, target, name, variant, rank)
                rate, origin = item.get("learning_rate"), "suite"
                if rate is None:
                    rate, origin = rates.get(where), "tuned"
                if rate is None:
                    rate, origin = suite.config["tuning"]["start"].get(name), "suite's start"
                if rate is None:
                    rate, origin = method.declaration.learning_rate, "method's default"
                for seed in suite.config["seeds"]:
                    spec = _spec(suite, base, target, method, variant, rank, seed, item)
                    spec |= {"learning_rate": rate, "learning_rate_source": origin}
                    rows.append(_row(suite, base, target, method, spec, []))
    return rows


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
    return {
        "suite": suite.name,
        "base": base.name,
        "target": target,
        "method": method.name,
        "variant": variant,
        "rank": rank,
        "seed": seed,
        "hyper": method.settings(item["set"]),
        "connector": item.get("connector", "frozen"),
        "modules": suite.config["modules"],
        "training": suite.targets(base.name)[target],
        "merges": declaration.merges,
        "family": declaration.family,
        "title": declaration.title,
        "limits": suite.config["limits"],
        "evaluation": suite.config["evaluation"],
        "source": base.spec["source"],
        "gate": base.spec.get("gate"),
        "template": base.spec.get("template", "chat"),
        "delimiter": base.spec.get("delimiter"),
        **_end(base.spec),
        "base_key": base.key,
        "tasks": {
            name: entry
            for name, entry in base.tasks.items()
            if entry["role"] != "target" or name == target
        },
    }


# Settings that change neither a trained weight nor a score.
_IDLE = ("title", "family", "limits", "learning_rate_source", "tasks", "evaluation", "gate")
_IDLE_TRAINING = ("checkpoint_every", "threads", "device")


def _row(
    suite: Suite,
    base: _Base,
    target: str,
    method: MethodFile,
    spec: dict[str, Any],
    parents: list[dict[str, Any]],
) -> dict[str, Any]:
    settings = {k: v for k, v in spec.items() if k not in _IDLE}
    settings["training"] = {
        k: v for k, v in settings["training"].items() if k not in _IDLE_TRAINING
    }
    spec = spec | {"parents": [parent["id"] for parent in parents]}
    settings["parents"] = spec["parents"]
    label = spec["method"] + (f"-r{spec['rank']}" if spec["rank"] else "")
    label += f"+{spec['variant']}" if spec["variant"] else ""
    slug = ".".join([spec["base"], target, label, f"s{spec['seed']}"])
    train_key = key_of(
        settings,
        method.digest,
        versions.TRAIN,
        base.tasks[target]["train_key"],
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
        "data_key": key_of({k: v["data_key"] for k, v in base.tasks.items()}, length=12),
        "train_key": train_key,
        "eval_key": key_of(scored),
        "spec": json.dumps(spec | {"method_digest": method.digest}, sort_keys=True),
    }


def parent_label(row: dict[str, Any]) -> str:
    """How a suite names a cell as a parent: method, method-r8 or method-r8+variant."""
    label = row["method"] + (f"-r{row['rank']}" if row["rank"] else "")
    return label + (f"+{row['variant']}" if row["variant"] else "")


def _posthoc(
    suite: Suite, base: _Base, target: str, trained: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    rows = []
    known = {(parent_label(row), row["seed"]): row for row in trained}
    for name, chosen in suite.chosen().items():
        method = suite.methods[name]
        if method.declaration.trains:
            continue
        for parent in chosen.get("parents", method.declaration.parents):
            for variant, item in _variants(method, chosen):
                for seed in suite.config["seeds"]:
                    source = known.get((parent, seed))
                    if source is None:
                        labels = {label for label, _ in known}
                        raise SuiteError(
                            f"methods.{name}.parents: "
                            f"{unknown('trained cell of this suite', parent, labels)}"
                        )
                    title = "-".join(part for part in ("of", parent, variant) if part)
                    spec = _spec(suite, base, target, method, title, None, seed, item)
                    rows.append(_row(suite, base, target, method, spec, [source]))
    return rows


def plan_key(config: dict[str, Any], layout: Layout, folder: Path) -> str:
    """Key of all that a plan depends on: the suite, methods, tasks, rates, engine and data.

    Data count by their files' sizes and times here, so that a run starts quickly; the plan itself
    reads what is in them.
    """
    rates = config.get("learning_rates")
    package = Path(__file__).parent
    paths = [layout.methods, layout.tasks, package / "worlds", package / "bases"]
    paths += [package / f"{name}.py" for name in PLANNERS]
    paths += [folder / rates] if isinstance(rates, str) and (folder / rates).is_file() else []
    files = [p for path in paths for p in ([path] if path.is_file() else path.rglob("*"))]
    files = sorted(p for p in files if p.is_file() and p.suffix in (".py", ".yaml", ".csv"))
    return key_of(config, _data_stamp(config, layout), key_of_files(*files))


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
    """Write a plan atomically as parquet."""
    with replacing(path) as temporary:
        plan.to_parquet(temporary, index=False)


def read_plan(path: Path) -> pd.DataFrame:
    """Read a plan; cells by id as the index."""
    return pd.read_parquet(path).set_index("id", drop=False)
