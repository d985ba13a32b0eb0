"""What is refused: code in data, names that are paths, numbers that are none."""

from __future__ import annotations

import ast
import json
import os
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from ballast import sources
from ballast.bases.build import check_unchanged, make_base
from ballast.bases.micro_lm import build_tokenizer
from ballast.cell import Work, _reason
from ballast.decompositions import Decompositions
from ballast.errors import BallastError, Damaged, DataError, Diverged, SuiteError
from ballast.faults import MACHINE, fault_of
from ballast.files import checksum_of, read_sealed, write_sealed
from ballast.layout import Layout
from ballast.models import load_base
from ballast.ready import _load
from ballast.tasks import read_task
from tiny import train, tuner_of

ROOT = Path(__file__).resolve().parents[2]

# Code.


@pytest.fixture
def saved(tmp_path):
    """A tiny base as a transformers folder."""
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def with_code(folder: Path, **changes: str) -> Path:
    """Add a module that leaves a trace when it is run, and name it wherever one can be named."""
    trace = folder.parent / "it ran"
    (folder / "canary.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Thing: pass\n")
    maps = {
        "config.json": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "canary.Thing"),
        "tokenizer_config.json": {"AutoTokenizer": ["canary.Thing", "canary.Thing"]},
    }
    for name, entries in maps.items():
        content = json.loads((folder / name).read_text()) | {"auto_map": entries}
        if name == "config.json":
            content |= changes
        (folder / name).write_text(json.dumps(content))
    return trace


def test_code_in_a_bases_folder_is_never_run(saved):
    trace = with_code(saved)
    assert load_base(saved).model.config.hidden_size == 16
    assert not trace.exists()


def test_a_base_that_needs_its_own_code_is_refused_in_one_line(saved):
    trace = with_code(saved, model_type="no_such_kind", architectures=["Thing"])
    with pytest.raises(DataError, match="code in the folder is never run") as error:
        load_base(saved)
    assert "\n" not in str(error.value)
    assert not trace.exists()


def test_a_script_that_loads_data_is_never_run(tmp_path):
    folder = tmp_path / "script"
    folder.mkdir()
    trace = tmp_path / "it ran"
    (folder / "script.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    with pytest.raises(DataError) as error:
        sources.rows({"reader": "hub", "dataset": str(folder)}, "test", 3)
    assert "\n" not in str(error.value)
    assert not trace.exists()


def test_a_function_in_a_task_file_is_refused(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("task: own\noutput_type: generate_until\ndoc_to_text: !function os.getcwd\n")
    with pytest.raises(SuiteError, match=r"not YAML: .*!function"):
        read_task(path)


def test_nothing_is_unpickled_and_no_code_is_trusted():
    """No module of the library or of a method loads pickles or asks for code of others."""
    for path in [*(ROOT / "workflow").rglob("*.py"), *(ROOT / "methods").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = f"{getattr(node.func.value, 'id', '')}.{node.func.attr}"
                assert called not in ("torch.load", "pd.read_pickle", "yaml.load"), path
                for word in node.keywords:
                    value = getattr(word.value, "value", None)
                    allowed = {"trust_remote_code": False, "weights_only": True}
                    assert value == allowed.get(word.arg, value), path
                    assert not (word.arg == "allow_pickle" and value), path


# Names.

ODD = ("..", ".", "", "../x", "/etc/x", "a/b", "a\\b", "C:\\x", "a\x00", "a\n", "x" * 400, "\ud800")
names = st.one_of(st.sampled_from(ODD), st.text(max_size=60), st.text("./\\~é", max_size=9))


@settings(deadline=None, max_examples=300)
@given(names, names, names, names)
def test_no_name_leads_out_of_results(a, b, c, d):
    layout = Layout(Path("/checkout"), Path("/checkout/results"))
    for make in (
        lambda: layout.suite(a), lambda: layout.cell(a, b), lambda: layout.curve(a, b, c),
        lambda: layout.plan(a, b), lambda: layout.base(a, b), lambda: layout.data(a, b, c, d),
        lambda: layout.scores(a, b, c, d), lambda: layout.decompositions(a, b),
    ):  # fmt: skip
        try:
            path = make()
        except BallastError:
            continue
        inside = os.path.normpath(path)
        assert inside == str(path)
        assert inside.startswith("/checkout/results/")
        assert all(len(part.encode()) <= 255 for part in path.parts)


@pytest.mark.parametrize("name", ODD)
def test_a_task_is_not_called_by_a_path(name, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("task: " + json.dumps(name) + "\noutput_type: generate_until\n")
    with pytest.raises(SuiteError) as error:
        read_task(path)
    assert "\n" not in str(error.value)


# Numbers, and methods that raise.


def test_a_base_with_nan_is_refused_by_the_weights_name(saved):
    model = LlamaForCausalLM.from_pretrained(saved)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(saved)
    with pytest.raises(DataError, match=r"model\.norm\.weight holds NaN"):
        _load(saved, "fp32", "cpu")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_adapter_with_nan_is_a_failure_and_not_stored(bad, tmp_path):
    tensors = {"weight.a": torch.ones(2), "weight.b": torch.tensor([1.0, bad])}
    with pytest.raises(Diverged, match=r"1 of 2 stored tensors hold NaN.*weight\.b"):
        Work._store(SimpleNamespace(folder=tmp_path), tensors, {})
    assert not list(tmp_path.iterdir())


MOMENTS = ("attach", "calibrate", "initialise", "penalty", "after_backward", "after_step", "merge")


@pytest.mark.parametrize("name", [*MOMENTS, "report", "parameter_groups"])
def test_a_method_that_raises_is_told_with_its_moment(name, make_model, make_batches):
    batches = make_batches("llama")
    tuner = tuner_of("lora", make_model("llama"), batches)
    broken = ModuleType("broken")
    broken.__dict__.update(tuner.method.__dict__)

    def fail(_: object) -> None:
        raise RuntimeError("the method's own\nmistake")

    setattr(broken, name, fail)
    tuner.method = broken

    def work() -> None:
        tuner.start()
        train(tuner, batches, 1)
        tuner.merge()
        tuner.report()

    with pytest.raises(RuntimeError) as error:
        work()
    assert _reason(error.value) == f"in {name}: RuntimeError: the method's own\nmistake"
    assert fault_of(error.value) is None


# Which errors are the machine's.


@pytest.mark.parametrize("number", sorted(MACHINE))
def test_errors_of_the_machine_are_nobodys_result(number, tmp_path):
    wrapped = RuntimeError("while saving")
    wrapped.__cause__ = OSError(number, os.strerror(number), str(tmp_path / "file"))
    text = fault_of(wrapped)
    assert MACHINE[number] in text
    assert str(tmp_path / "file") in text
    assert "\n" not in text


def test_errors_of_a_method_are_its_own(tmp_path):
    own = [ValueError("no"), FileNotFoundError(2, "x", "/of/the/method"), ConnectionError("x")]
    assert [fault_of(error, tmp_path) for error in own] == [None] * 3
    gone = FileNotFoundError(2, "No such file", str(tmp_path / "shared/data"))
    assert "is gone" in fault_of(gone, tmp_path)


# Rows.


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "x", "response": "\ud800"}, "response is .*no Unicode"),
        ({"question": "x", "choices": ["a", "b\udfff"], "answer": 0}, "choices is .*no Unicode"),
        ({"question": None, "response": "x"}, "question is None"),
        ({"question": float("nan"), "response": "x"}, "question is nan"),
        ({"question": "x", "response": ""}, "response is ''"),
        ({"question": ["x"] * 999, "response": ""}, "question is .{0,125}; a text"),
    ],
)
def test_a_bad_row_is_told_in_a_short_line(row, said, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=f"mine.jsonl, line 1: {said}") as error:
        sources.rows({"reader": "jsonl", "test": str(path)}, "test", None)
    assert len(str(error.value)) < 300


def test_a_renamed_column_is_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"q": 7, "response": "x"}\n')
    source = {"reader": "jsonl", "test": str(path), "columns": {"question": "q"}}
    with pytest.raises(DataError, match=r"question \(column q\) is 7; a text is expected"):
        sources.rows(source, "test", None)


@pytest.mark.parametrize("broken", [b"", b"no picture", None])
def test_a_broken_picture_of_a_hubs_data_is_named(broken, tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    good = (tmp_path / "a.png").read_bytes()
    cut = good[: len(good) // 2] if broken is None else broken
    rows = {
        "question": ["x", "y"], "response": ["1", "2"], "image": [{"bytes": good}, {"bytes": cut}],
    }  # fmt: skip
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    with pytest.raises(DataError, match="own/set test, row 2: ") as error:
        sources.rows({"reader": "hub", "dataset": "own/set"}, "test", None)
    assert "\n" not in str(error.value)


# Checksums.


def test_no_flipped_bit_of_a_sealed_file_goes_unnoticed(tmp_path):
    path, value = tmp_path / "x.json", {"a": 1.5, "b": ["é", None], "c": {"d": True, "1": 2}}
    write_sealed(path, value)
    whole = path.read_bytes()
    assert read_sealed(path) == value
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with suppress(Damaged):
            assert read_sealed(path) == value  # white space between values
    for cut in range(len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(Damaged):
            read_sealed(path)
    assert checksum_of({"b": 1, "a": 2}) == checksum_of({"a": 2, "b": 1})


def test_a_decomposition_of_another_weight_is_made_again(tmp_path, capsys):
    cache, first, second = Decompositions(tmp_path), torch.randn(6, 4), torch.randn(6, 4)
    expected = cache.svd(first)
    one = next(tmp_path.iterdir())
    cache.svd(second)
    two = next(p for p in tmp_path.iterdir() if p != one)
    two_bytes = two.read_bytes()
    one.write_bytes(two_bytes)
    assert all(torch.equal(a, b) for a, b in zip(cache.svd(first), expected, strict=True))
    assert "another weight" in capsys.readouterr().err
    assert one.with_name(f"{one.name}.damaged").read_bytes() == two_bytes


def test_a_users_own_base_that_changes_is_told_and_left_alone(saved, tmp_path):
    spec = {"source": {"path": str(saved)}}
    made = make_base(spec, tmp_path / "ready", print)
    check_unchanged(made)
    path = saved / "model.safetensors"
    content, stamp = path.read_bytes(), path.stat()
    flipped = bytearray(content)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    for look in (
        lambda: check_unchanged(made, True),
        lambda: make_base(spec, tmp_path / "ready", print),
    ):
        with pytest.raises(DataError, match=r"model\.safetensors: changed.*put the old file back"):
            look()
    assert path.read_bytes() == flipped
    path.write_bytes(content)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    check_unchanged(made)
    (saved / "adapter_config.json").write_text("{}")  # transformers would load an adapter
    with pytest.raises(DataError, match=r"adapter_config\.json: is new"):
        check_unchanged(made)
