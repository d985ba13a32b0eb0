"""Suites: what is refused, with which message; what is filled in."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ballast import cli
from ballast.declare import discover
from ballast.errors import BallastError, SuiteError
from ballast.layout import Layout
from ballast.plan import make_plan
from ballast.status import make_plan_file
from ballast.suite import EVALUATION, TRAINING, TUNING, load_suite, read_suite
from ballast.tasks import read_tasks

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = Layout(ROOT, Path("results"))
SUITES = sorted((ROOT / "config").glob("*.yaml"))

GOOD = """
suite: good
seeds: [0, 1]
bases:
  micro-vlm:
    source: {world: micro-vlm}
    upstream: [vlm_color]
    targets: [vlm_digit]
methods: {lora: {}, full_st: {}, wise_ft: {}}
"""

# Where the suite is changed (dots), to what, and what the message must say.
BAD = [
    # Names that do not exist, with the nearest that does.
    ("methods.loar", {}, ["methods: unknown method 'loar'", "did you mean 'lora'?", "full_st"]),
    ("methods", ["lora", "fullst"], ["unknown method 'fullst'", "did you mean 'full_st'?"]),
    ("methods.../x", {}, ["methods: unknown method '../x'"]),
    (
        "bases.micro-vlm.upstream",
        ["vlm_colour"],
        ["bases.micro-vlm.upstream: unknown task 'vlm_colour'", "did you mean 'vlm_color'?"],
    ),
    ("bases.micro-vlm.targets", ["vlm_digits"], ["targets: unknown task", "mean 'vlm_digit'?"]),
    ("bases.micro-vlm.probes", ["wikitxt2"], ["probes: unknown task", "mean 'wikitext2'?"]),
    (
        "bases.micro-vlm.source",
        {"wrold": "micro-vlm"},
        ["bases.micro-vlm.source: unknown key 'wrold'", "did you mean 'world'?", "hub"],
    ),
    (
        "bases.micro-vlm.source.world",
        "micro-vml",
        ["bases.micro-vlm.source.world: 'micro-vml'", "allowed: micro-lm, micro-vlm"],
    ),
    (
        "methods.lora",
        {"set": {"alpha_over_rank": 1}},
        ["methods.lora.set: unknown hyper-parameter of lora", "did you mean 'alpha_over_r'?"],
    ),
    ("methods.lora", {"rank": [2]}, ["methods.lora: unknown key 'rank'", "mean 'ranks'?"]),
    ("sede", [0], ["the suite: unknown key 'sede'", "did you mean 'seeds'?"]),
    ("training", {"stps": 3}, ["training: unknown key 'stps'", "did you mean 'steps'?"]),
    (
        "bases.micro-vlm.targets",
        {"vlm_digit": {"step": 3}},
        ["bases.micro-vlm.targets.vlm_digit: unknown key 'step'", "mean 'steps'?"],
    ),
    ("tuning", {"start": {"lorra": 0.1}}, ["tuning.start: unknown method", "mean 'lora'?"]),
    (
        "methods.wise_ft",
        {"parents": ["fullst"]},
        ["methods.wise_ft.parents: unknown trained cell", "'fullst'", "mean 'full_st'?", "lora-r8"],
    ),
    ("methods.wise_ft", {"parents": ["lora-r2"]}, ["'lora-r2'", "did you mean 'lora-r8'?"]),
    ("methods", {"lora": {}, "wise_ft": {}}, ["wise_ft.parents", "'full_st'", "known: lora-r8"]),
    (
        "methods",
        {"full_st": {}, "dare": {}, "wise_ft": {"parents": ["dare"]}},
        ["wise_ft.parents", "'dare'", "known: full_st"],
    ),
    # Wrong types and values.
    ("seeds", 0, ["seeds: 0 is not of type 'array'"]),
    ("seeds", [], ["seeds: [] should be non-empty"]),
    ("seeds", [1, 1], ["seeds: [1, 1] has non-unique elements"]),
    ("seeds", [-1], ["seeds.0: -1 is less than the minimum of 0"]),
    ("seeds", [1.0], ["seeds.0: 1.0 is not of type 'integer'"]),
    ("seeds", [True], ["seeds.0: True is not of type 'integer'"]),
    ("ranks", [0], ["ranks.0: 0 is less than the minimum of 1"]),
    ("ranks", ["8"], ["ranks.0: '8' is not of type 'integer'", "no quotes"]),
    ("methods.lora", {"ranks": [0]}, ["methods.lora.ranks.0: 0 is less than the minimum of 1"]),
    ("methods", {}, ["methods: {} should be non-empty", "`all`"]),
    ("methods", [], ["methods: [] should be non-empty"]),
    ("methods", "lora", ["methods: 'lora'; allowed: `all`, a list of names"]),
    ("methods.lora", None, ["methods.lora: None is not of type 'object'"]),
    (
        "methods.lora",
        {"learning_rate": "1e-3"},
        ["methods.lora.learning_rate: '1e-3' is not of type 'number'", "write 1.0e-3"],
    ),
    ("methods.lora", {"learning_rate": 0}, ["methods.lora.learning_rate: 0 is less than"]),
    ("methods.lora", {"connector": "adpted"}, ["'adpted'; allowed: frozen, tuned, adapted"]),
    ("methods.lora", {"set": {"dropout": "much"}}, ["lora.dropout: 'much' is not a float"]),
    ("methods.lora", {"set": {"dropout": 2}}, ["lora.dropout: 2 is above the most allowed, 0.99"]),
    (
        "methods.lora",
        {"variants": {"wet": {"set": {"dropout": 2}}}},
        ["methods.lora.variants.wet.set: lora.dropout: 2 is above"],
    ),
    ("training", {"steps": "many"}, ["training.steps: 'many' is not of type 'integer'"]),
    ("training", {"schedule": "cosin"}, ["training.schedule: 'cosin'; allowed: cosine, linear"]),
    ("limits", {"memory_mb": 1}, ["limits.memory_mb: 1 is less than the minimum of 64"]),
    ("modules", "q_proj", ["modules: 'q_proj'; allowed: `all` linear modules"]),
    ("bases", {}, ["bases: {} should be non-empty"]),
    ("bases", ["micro-vlm"], ["bases: ['micro-vlm'] is not of type 'object'"]),
    # Names that become folders.
    ("suite", "../x", ["suite: '../x' does not match", "its folder under results/"]),
    ("suite", "..", ["suite: '..' does not match"]),
    ("suite", "a/b", ["suite: 'a/b' does not match"]),
    ("suite", "shared", ["suite: 'shared' is a folder of Ballast's own"]),
    ("suite", "slurm", ["suite: 'slurm' is a folder of Ballast's own"]),
    ("suite", "", ["suite: '' does not match"]),
    ("suite", 7, ["suite: 7 is not of type 'string'"]),
    ("methods.lora", {"variants": {"../x": {}}}, ["methods.lora.variants: '../x' does not match"]),
    # What does not fit together.
    ("methods.full_st", {"ranks": [2]}, ["methods.full_st.ranks: [2]; full_st has no rank"]),
    (
        "methods.fish",
        {"connector": "adapted"},
        ["methods.fish.connector: adapted; allowed for fish: frozen, tuned"],
    ),
    (
        "methods.fish",
        {"variants": {"wide": {"connector": "adapted"}}},
        ["methods.fish.variants.wide.connector: adapted"],
    ),
    ("methods.lora", {"parents": ["full_st"]}, ["methods.lora.parents: lora is not a post-hoc"]),
    ("methods.wise_ft", {"learning_rate": 1.0}, ["methods.wise_ft.learning_rate", "not train"]),
    (
        "bases.micro-vlm.targets",
        ["vlm_color"],
        ["bases.micro-vlm: vlm_color is both a target and an upstream task"],
    ),
    ("bases.micro-vlm.targets", ["tinystories"], ["targets: tinystories is plain text"]),
    ("bases.micro-vlm.probes", ["vlm_color"], ["probes: vlm_color is also a target or"]),
    (
        "bases.micro-vlm.source",
        {"world": "micro-vlm", "hub": "a/b"},
        ["bases.micro-vlm.source: exactly one of world, hub or llama2c", "got world, hub"],
    ),
    ("bases.micro-vlm.source", {}, ["bases.micro-vlm.source: exactly one", "got none"]),
    ("bases.micro-vlm.source", {"llama2c": {"model": "x"}}, ["key 'tokenizer' is missing"]),
    ("bases.micro-vlm.source", {"path": "/no/such"}, ["bases.micro-vlm: /no/such: no such file"]),
    (
        "bases.micro-vlm.template",
        "Q: {q}",
        ["bases.micro-vlm.template: 'Q: {q}'; allowed: chat, or a text that contains {question}"],
    ),
    ("bases.micro-vlm.template", "{x} {question}", ["template: '{x} {question}'; allowed: chat"]),
    ("tuning", {"seeds": [7, 1]}, ["tuning.seeds: 1 is also a seed of the results"]),
]


def changed(where: str, value: object) -> dict:
    """The good suite with one value changed; a name that holds dots stands last."""
    config = yaml.safe_load(GOOD)
    place = config
    *path, last = where.split(".", 1) if where.startswith("methods.") else where.split(".")
    for key in path:
        place = place[key]
    place[last] = value
    return config


def refusal(config: dict) -> str:
    with pytest.raises(BallastError) as caught:
        make_plan(load_suite(config, LAYOUT))
    return str(caught.value)


@pytest.mark.parametrize(("where", "value", "said"), BAD, ids=[f"{w}={v}" for w, v, _ in BAD])
def test_a_bad_suite_is_refused_with_what_is_allowed(where, value, said):
    message = refusal(changed(where, value))
    for part in said:
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["../x", "a/b", ".", "A"])
def test_a_base_cannot_leave_its_folder(name):
    config = yaml.safe_load(GOOD)
    config["bases"][name] = config["bases"].pop("micro-vlm")
    assert f"bases: {name!r} does not match" in refusal(config)


@pytest.mark.parametrize("key", ["suite", "seeds", "bases", "methods"])
def test_a_missing_key_is_named(key):
    config = yaml.safe_load(GOOD)
    del config[key]
    assert refusal(config) == f"the suite: the key '{key}' is missing"


@pytest.mark.parametrize("key", ["source", "upstream", "targets"])
def test_a_missing_key_of_a_base_is_named(key):
    config = yaml.safe_load(GOOD)
    del config["bases"]["micro-vlm"][key]
    assert refusal(config) == f"bases.micro-vlm: the key '{key}' is missing"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "a mapping of keys is expected"),
        ("", "a mapping of keys is expected"),
        ("just text", "a mapping of keys is expected"),
        ("suite: [unclosed\n", "not YAML"),
        (None, "no such suite; see config/"),
    ],
)
def test_a_file_that_holds_no_suite_is_refused(tmp_path, capsys, text, said):
    path = tmp_path / "suite.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SuiteError, match=said) as caught:
        read_suite(path, LAYOUT)
    assert str(path) in str(caught.value)
    # The command says the same and has a traceback for nobody.
    assert cli.main(["plan", str(path)]) == 2
    assert capsys.readouterr().err == f"ballast: {caught.value}\n"


@pytest.mark.parametrize("config", [{"suite": "x"}, changed("suite", "../x"), changed("bases", 3)])
def test_planning_refuses_a_bad_suite_and_writes_nothing(tmp_path, config):
    with pytest.raises(SuiteError):
        make_plan_file(config, ROOT, tmp_path / "results", tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_planning_refuses_comes_back_as_its_one_message(tmp_path):
    with pytest.raises(SuiteError) as caught:
        make_plan_file(changed("methods.loar", {}), ROOT, tmp_path / "results", tmp_path)
    assert str(caught.value) == refusal(changed("methods.loar", {}))
    assert not (tmp_path / "results").exists()


def test_defaults_are_filled_in_and_the_callers_copy_is_left_alone():
    config = yaml.safe_load(GOOD)
    before = copy.deepcopy(config)
    suite = load_suite(config, LAYOUT)
    assert config == before
    assert suite.config["ranks"] == [8]
    assert suite.config["modules"] == "all"
    assert suite.config["evaluation"] == EVALUATION
    assert suite.config["limits"] == {}
    assert suite.config["tuning"] == TUNING
    assert suite.targets("micro-vlm") == {"vlm_digit": TRAINING}


def test_training_settings_go_from_suite_to_base_to_target():
    config = changed("training", {"steps": 7, "clip": 2.0, "warmup": 0.5})
    base = config["bases"]["micro-vlm"]
    base["training"] = {"steps": 8, "clip": 3.0}
    base["targets"] = {"vlm_digit": {"steps": 9}, "vlm_count": {}}
    targets = load_suite(config, LAYOUT).targets("micro-vlm")
    assert targets["vlm_digit"] == TRAINING | {"steps": 9, "clip": 3.0, "warmup": 0.5}
    assert targets["vlm_count"] == TRAINING | {"steps": 8, "clip": 3.0, "warmup": 0.5}


def test_all_means_every_method_file():
    suite = load_suite(changed("methods", "all"), LAYOUT)
    assert list(suite.chosen()) == sorted(discover(LAYOUT.methods))
    plan = make_plan(suite)
    absent = {text.split(" on ")[0] for text in plan.attrs["left_out"]}
    assert set(plan["method"]) | absent == set(suite.chosen())
    # One single target only: what needs two has no cells, and the plan says so.
    assert {"ties", "emr", "model_soup", "fisher_merge"} == set(suite.chosen()) - set(
        plan["method"]
    )


def test_a_list_of_methods_means_each_with_its_defaults():
    assert load_suite(changed("methods", ["lora", "dora"]), LAYOUT).chosen() == {
        "lora": {},
        "dora": {},
    }


def test_a_table_of_rates_that_is_not_there_yet_is_no_error():
    suite = load_suite(changed("learning_rates", "not/yet.csv"), LAYOUT)
    assert suite.config["learning_rates"] is None


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_suite_of_the_repository_is_valid(path):
    config = yaml.safe_load(path.read_text())
    suite = read_suite(path, LAYOUT)
    assert suite.name == config["suite"]
    assert suite.config.keys() >= {"training", "evaluation", "limits", "tuning", "ranks"}
    for name in suite.chosen():
        assert dataclasses.is_dataclass(suite.methods[name].hyper)


def test_reading_a_suite_imports_no_torch():
    code = (
        "import sys; from pathlib import Path; from ballast.layout import Layout\n"
        "from ballast.suite import read_suite\n"
        f"read_suite(Path({str(SUITES[0])!r}), Layout(Path({str(ROOT)!r}), Path('results')))\n"
        "assert not {'torch', 'transformers', 'datasets', 'snakemake'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Task files.

TASK = {
    "task": "mine",
    "output_type": "multiple_choice",
    "metadata": {
        "title": "Mine",
        "metric": "accuracy",
        "unit": "points",
        "direction": "higher",
        "source": {"reader": "jsonl", "test": "x"},
    },
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"unit": "percent"}, "mine.yaml: metadata.unit 'percent'; allowed"),
        ({"direction": "lower"}, "points are 0 to 100 and higher is better"),
        ({"title": None}, "mine.yaml: metadata.title is missing"),
        ({"source": None}, "mine.yaml: metadata.source is missing"),
    ],
)
def test_a_bad_task_file_is_refused(tmp_path, changes, said):
    metadata = {k: v for k, v in (TASK["metadata"] | changes).items() if v is not None}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(TASK | {"metadata": metadata}))
    with pytest.raises(SuiteError, match=said.replace("(", r"\(")):
        read_tasks(tmp_path)


def test_two_tasks_of_one_name_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(TASK))
    with pytest.raises(SuiteError, match="task mine is also in"):
        read_tasks(tmp_path)
