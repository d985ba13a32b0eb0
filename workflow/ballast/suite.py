"""A suite: one file of config/, validated and with every default filled in.

The schema says what may stand where; the checks here say what the schema cannot: that a method, a
task, a parent or a hyper-parameter exists and fits. Everything is refused before any work starts,
with one message that names the key, the value, what is allowed and what to do.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from ballast.budget import parse_budget
from ballast.declare import MethodFile, discover
from ballast.errors import MethodError, SuiteError, unknown
from ballast.escape import one_line
from ballast.layout import Layout
from ballast.tasks import Task, read_tasks

TRAINING = {
    "steps": 200,
    "batch_size": 32,
    "accumulation": 1,
    "examples": None,
    "schedule": "cosine",
    "warmup": 0.06,
    "weight_decay": 0.0,
    "clip": 1.0,
    "max_length": 512,
    "precision": "fp32",
    "gradient_checkpointing": False,
    "checkpoint_every": 100,
    "device": "auto",
    "threads": 1,
}
# Folders under results/ that belong to no suite.
RESERVED = ("kept", "published", "shared", "slurm")
EVALUATION = {
    "upstream": 300,
    "downstream": 500,
    "validation": 200,
    "generation": 100,
    "batch_size": 128,
    "drift": True,
}
# Of an encoder's classification head; among the settings of targets that have one.
HEAD_LEARNING_RATE = 1e-3
TUNING: dict[str, Any] = {"factors": [0.3, 1.0, 3.0], "seeds": [100], "start": {}}

# Checkpoints of a trajectory; positions of a rewind between the base (0) and the cell (1); test
# items that a point is scored on (None: all); the methods that have curves.
CURVES: dict[str, Any] = {
    "checkpoints": 5,
    "alphas": [0.25, 0.5, 0.75, 0.9],
    "items": None,
    "methods": "all",
}


@dataclass(frozen=True)
class Suite:
    """A valid suite. `config` is the file's content with defaults; the names in it exist."""

    name: str
    config: dict[str, Any]
    methods: dict[str, MethodFile]
    tasks: dict[str, Task]
    folder: Path

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where relative paths of the suite may start: its own folder, and the one above it."""
        return self.folder, self.folder.parent

    def targets(self, base: str) -> dict[str, dict[str, Any]]:
        """The base's targets with their training settings, complete."""
        spec = self.config["bases"][base]
        common = TRAINING | self.config["training"] | spec.get("training", {})
        found = {}
        for name, own in _named(spec["targets"]).items():
            found[name] = common | {key: value for key, value in own.items() if key != "tasks"}
            if any(self.tasks[t].classes for t in own.get("tasks", [name]) if t in self.tasks):
                found[name].setdefault("head_learning_rate", HEAD_LEARNING_RATE)
        return found

    def target_tasks(self, base: str, target: str) -> list[str]:
        """The tasks of a target: those of a mixture, or the one of the target's own name."""
        own = _named(self.config["bases"][base]["targets"])[target]
        return own.get("tasks", [target])

    def seeds(self, base: str) -> list[int]:
        """Seeds of a base's cells: its own, or the suite's."""
        return self.config["bases"][base].get("seeds", self.config["seeds"])

    def limits(self, base: str) -> dict[str, Any]:
        """What is said of the limits of a base's cells: its own, or the suite's."""
        return self.config["limits"] | self.config["bases"][base].get("limits", {})

    def kind(self, base: str) -> str:
        """Which of `declare.KINDS` a base is, by the tasks that it is given."""
        spec = self.config["bases"][base]
        names = [*spec["upstream"], *spec.get("probes", [])]
        names += [task for target in self.targets(base) for task in self.target_tasks(base, target)]
        tasks = [self.tasks[name] for name in names]
        if any(task.encoder for task in tasks):
            return "encoder"
        return "vision-language" if any(task.image for task in tasks) else "text"

    def chosen(self) -> dict[str, dict[str, Any]]:
        """The methods that the suite runs, with their ranks, variants and settings as written."""
        methods = self.config["methods"]
        if methods == "all":
            return {name: {} for name in self.methods}
        return _named(methods)


def _named(items: Any) -> dict[str, Any]:
    """A list of names as a mapping; a mapping as it is, blanks filled."""
    if isinstance(items, dict):
        return {name: own or {} for name, own in items.items()}
    return {name: {} for name in items}


def _where(error: jsonschema.ValidationError) -> str:
    return ".".join(str(part) for part in error.absolute_path) or "the suite"


def _explain(error: jsonschema.ValidationError) -> str:
    """One sentence for a schema error: key, value, what is allowed."""
    where, value = _where(error), error.instance
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        extra = sorted(set(value) - set(known))[0]
        return f"{where}: {unknown('key', str(extra), known)}"
    if error.validator == "required":
        missing = [key for key in error.validator_value if key not in value]
        return f"{where}: the key {missing[0]!r} is missing"
    if error.validator in ("enum", "const"):
        allowed = error.validator_value
        allowed = allowed if isinstance(allowed, list) else [allowed]
        return f"{where}: {value!r}; allowed: {', '.join(map(str, allowed))}"
    about = error.schema.get("description")
    if about is None and error.parent and error.parent.absolute_path == error.absolute_path:
        about = error.parent.schema.get("description")
    if error.validator in ("oneOf", "anyOf") and about:
        return f"{where}: {value!r}; allowed: {about}"
    if error.validator == "type" and isinstance(value, str) and _is_number(value):
        about = "YAML reads 1e-3 as text; write 1.0e-3" if "e" in value.lower() else "no quotes"
    return f"{where}: {error.message}" + (f" ({about})" if about else "")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_integer(_: Any, value: Any) -> bool:
    """JSON schema takes 8.0 for an integer; in names and counts it is not one."""
    return isinstance(value, int) and not isinstance(value, bool)


_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)


def check_schema(config: Any, layout: Layout) -> None:
    """Raise SuiteError for the most telling violation of the schema, if there is one."""
    schema = yaml.safe_load(layout.schema("suite").read_text(encoding="utf-8"))
    errors = _Validator(schema).iter_errors(config)
    worst = jsonschema.exceptions.best_match(errors)
    if worst is not None:
        raise SuiteError(_explain(worst))
    if config["suite"] in RESERVED:
        folders = ", ".join(RESERVED)
        raise SuiteError(f"suite: {config['suite']!r} is a folder of Ballast's own; not {folders}")


def load_suite(config: dict[str, Any], layout: Layout, folder: Path | None = None) -> Suite:
    """Validate a suite's content and fill in its defaults.

    folder: where paths in the suite start (its learning rates); by default config/.
    Raises SuiteError or MethodError with one clear message.
    """
    check_schema(config, layout)
    config = copy.deepcopy(config)
    config["training"] = config.get("training", {})
    config["evaluation"] = EVALUATION | config.get("evaluation", {})
    config["limits"] = config.get("limits", {})
    config["tuning"] = TUNING | config.get("tuning", {})
    config["curves"] = CURVES | config.get("curves", {})
    config.setdefault("ranks", [] if "budgets" in config else [8])
    config.setdefault("budgets", [])
    config.setdefault("modules", "all")
    suite = Suite(
        config["suite"],
        config,
        discover(layout.methods),
        read_tasks(layout.tasks),
        folder or layout.root / "config",
    )
    for text in config["budgets"]:
        parse_budget(text)
    for base, spec in config["bases"].items():
        _check_base(suite, base, spec)
    for name, spec in suite.chosen().items():
        _check_method(suite, name, spec)
    _check_tuning(suite)
    _check_curves(suite)
    if "protocol" in config:
        from ballast.published.data import check_protocol  # few suites need pandas to be read

        check_protocol(config["protocol"])
    rates = config.get("learning_rates")
    if rates and not (suite.folder / rates).is_file():
        # A suite may name the table that its first `tune` will write.
        suite.config["learning_rates"] = None
    return suite


def read_config(path: Path) -> dict[str, Any]:
    """A suite's content as its file has it. Raises SuiteError if it is not a mapping in YAML."""
    if path.is_dir():
        raise SuiteError(f"{path}: a folder; a suite's file is needed, such as config/config.yaml")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SuiteError(f"{path}: no such suite; see config/") from None
    except UnicodeDecodeError:
        raise SuiteError(f"{path}: no text in UTF-8; a suite's file is YAML, see config/") from None
    except yaml.YAMLError as error:
        raise SuiteError(f"{path}: not YAML: {_yaml_fault(error)}") from None
    if not isinstance(config, dict):
        raise SuiteError(f"{path}: a mapping of keys is expected")
    return config


def _yaml_fault(error: yaml.YAMLError) -> str:
    """Where a file is no YAML, and why, in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return one_line(str(error))
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def read_suite(path: Path, layout: Layout) -> Suite:
    """Read and validate a suite's file."""
    return load_suite(read_config(path), layout, path.parent)


def _check_base(suite: Suite, base: str, spec: dict[str, Any]) -> None:
    where = f"bases.{base}"
    source = spec["source"]
    kinds = [kind for kind in ("world", "hub", "llama2c") if kind in source]
    fetched = kinds == ["hub", "llama2c"]  # files of that format in a repository of the hub
    if len(kinds) != 1 and not fetched and not ("path" in source and not kinds):
        raise SuiteError(
            f"{where}.source: exactly one of world, hub or llama2c is needed (or a path alone); "
            f"got {', '.join(kinds) or 'none'}"
        )
    template = spec.get("template", "chat")
    if template != "chat" and not _asks(template):
        raise SuiteError(
            f"{where}.template: {template!r}; allowed: chat, or a text that contains {{question}}"
        )
    upstream = spec["upstream"]
    targets = _check_targets(suite, base)
    for key, names in (("upstream", upstream), ("probes", spec.get("probes", []))):
        for name in names:
            if name not in suite.tasks:
                raise SuiteError(f"{where}.{key}: {unknown('task', name, suite.tasks)}")
    for name in spec.get("probes", []):
        if name in targets or name in upstream:
            raise SuiteError(f"{where}.probes: {name} is also a target or an upstream task")
    for name in targets:
        if name in upstream:
            raise SuiteError(
                f"{where}: {name} is both a target and an upstream task; "
                "what is trained cannot measure what is retained"
            )
        if suite.tasks[name].rolling:
            raise SuiteError(f"{where}.targets: {name} is plain text without responses to train on")
        if suite.tasks[name].unit != "points":
            raise SuiteError(f"{where}.targets: {name} is not measured in points")
    _check_encoder(suite, base, targets)


def _check_encoder(suite: Suite, base: str, targets: list[str]) -> None:
    """An encoder fills gaps upstream and names classes downstream; no other base does either."""
    where, spec = f"bases.{base}", suite.config["bases"][base]
    encoder = suite.kind(base) == "encoder"
    for key, names in (
        ("upstream", spec["upstream"]),
        ("probes", spec.get("probes", [])),
        ("targets", targets),
    ):
        wanted = "classification" if key == "targets" else "masked_token"
        for name in names:
            kind = suite.tasks[name].output_type
            if encoder and kind != wanted:
                raise SuiteError(
                    f"{where}.{key}: {name} is a task of type {kind}; allowed for an encoder: "
                    f"{wanted}"
                )
    for target, training in suite.targets(base).items():
        if "head_learning_rate" in training and not encoder:
            raise SuiteError(
                f"{where}.targets.{target}: head_learning_rate is for targets of encoders only"
            )


def _check_targets(suite: Suite, base: str) -> list[str]:
    """The tasks of a base's targets; a mixture has a name and shared settings of its own."""
    where, tasks = f"bases.{base}.targets", {}
    for target, training in suite.targets(base).items():
        names = suite.target_tasks(base, target)
        if names != [target] and target in suite.tasks:
            raise SuiteError(f"{where}.{target}: a mixture needs a name that no task has")
        for name in names:
            if name not in suite.tasks:
                raise SuiteError(f"{where}: {unknown('task', name, suite.tasks)}")
            data = (training["examples"], training["max_length"])
            if tasks.setdefault(name, (target, *data))[1:] != data:
                raise SuiteError(
                    f"{where}.{target}: {name} stands in {tasks[name][0]} too, there with other "
                    "examples or max_length; a task's data are the same in every target"
                )
    return list(tasks)


def _asks(template: str) -> bool:
    """Whether a template places the question, and nothing that it would not be given."""
    try:
        return "QUESTION" in template.format(question="QUESTION")
    except (KeyError, IndexError, ValueError):
        return False


def _check_curves(suite: Suite) -> None:
    methods = suite.config["curves"]["methods"]
    for name in [] if methods == "all" else methods:
        if name not in suite.methods:
            raise SuiteError(f"curves.methods: {unknown('method', name, suite.methods)}")


def _check_tuning(suite: Suite) -> None:
    tuning = suite.config["tuning"]
    for name in tuning["start"]:
        if name not in suite.methods:
            raise SuiteError(f"tuning.start: {unknown('method', name, suite.methods)}")
    used = {seed for base in suite.config["bases"] for seed in suite.seeds(base)}
    both = sorted(set(tuning["seeds"]) & used)
    if both:
        raise SuiteError(
            f"tuning.seeds: {both[0]} is also a seed of the results; "
            "rates are found with seeds of their own"
        )


def single_targets(suite: Suite, base: str) -> list[str]:
    """The base's targets that are no mixtures."""
    return [t for t in suite.targets(base) if suite.target_tasks(base, t) == [t]]


def applies(suite: Suite, method: MethodFile, base: str) -> bool:
    """Whether a method can have cells on a base."""
    declaration = method.declaration
    if declaration.several_targets and len(single_targets(suite, base)) < 2:
        return False
    return suite.kind(base) in declaration.applies_to


def _check_method(suite: Suite, name: str, spec: dict[str, Any]) -> None:
    where = f"methods.{name}"
    if name not in suite.methods:
        raise SuiteError(f"methods: {unknown('method', name, suite.methods)}")
    method = suite.methods[name]
    declaration = method.declaration
    if "ranks" in spec and declaration.rank is None:
        raise SuiteError(f"{where}.ranks: {spec['ranks']}; {name} has no rank")
    if "budgets" in spec and not (declaration.rank or declaration.size):
        raise SuiteError(
            f"{where}.budgets: {name} has neither a rank nor a size to fit to a budget"
        )
    fitting = [base for base in suite.config["bases"] if applies(suite, method, base)]
    if not fitting and suite.config["methods"] != "all":
        raise SuiteError(
            f"methods.{name}: no base of the suite fits; it is for "
            + (
                "bases of two targets or more that are no mixtures"
                if declaration.several_targets
                else f"{' and '.join(declaration.applies_to)} bases"
            )
        )
    if not declaration.trains:
        for key in ("connector", "learning_rate"):
            if key in spec:
                raise SuiteError(f"{where}.{key}: {name} is post-hoc and does not train")
    elif "parents" in spec:
        raise SuiteError(f"{where}.parents: {name} is not a post-hoc method")
    for text in spec.get("budgets", []):
        parse_budget(text)
    settings = [(where, spec)]
    settings += [(f"{where}.variants.{k}", v) for k, v in spec.get("variants", {}).items()]
    targets = {target for base in suite.config["bases"] for target in suite.targets(base)}
    for key, item in settings:
        for target in item.get("targets", []):
            if target not in targets:
                raise SuiteError(f"{key}.targets: {unknown('target', target, targets)}")
        try:
            method.settings(spec.get("set", {}) | item.get("set", {}), suite.folders)
        except MethodError as error:
            raise SuiteError(f"{key}.set: {error}") from None
        if item.get("connector") == "adapted" and not adapts_connector(method):
            raise SuiteError(f"{key}.connector: adapted; allowed for {name}: frozen, tuned")


def adapts_connector(method: MethodFile) -> bool:
    """Whether a method can train adapters on the connector: its own, or LoRA at a rank it names."""
    declaration = method.declaration
    if declaration.rank or declaration.family == "reparameterization":
        return True
    return "connector_rank" in {item.name for item in dataclasses.fields(method.hyper)}
