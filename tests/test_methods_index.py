"""methods/README.md says what the files say, and is as they are now."""

from __future__ import annotations

import csv

import pytest

from ballast import cli
from ballast.declare import discover
from ballast.index import COLUMNS, MOMENTS, OVERHEAD, PAGE, index_text, overhead, trainable
from ballast.layout import Layout
from ballast.tuner import load_method
from ballast.twins import TWINS
from tiny import METHODS

FILES = discover(METHODS)
STALE = "methods/README.md is stale: run `ballast methods --write`"


def _rows(text):
    """Cells by column, of every method on the page."""
    lines = [line for line in text.splitlines() if line.startswith("| [")]
    cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return {row[0].split("]")[0][1:]: dict(zip(COLUMNS, row, strict=False)) for row in cells}


def test_the_page_is_not_stale():
    page = METHODS / PAGE
    assert page.is_file(), STALE
    assert page.read_text(encoding="utf-8") == index_text(METHODS), STALE


def test_every_file_has_its_row():
    rows = _rows(index_text(METHODS))
    assert set(rows) == set(FILES)
    assert rows["lora"]["trainable"] == "r (m + n)"
    assert rows["rslora"]["trainable"] == "r (m + n)"  # by the file that it imports it from
    assert rows["lora"]["moments"] == "attach, initialise"
    assert rows["dora"]["PEFT 0.21.2"] == "`LoraConfig(use_dora=True)`"
    assert rows["milora"]["PEFT 0.21.2"] == ""
    assert rows["wise_ft"]["trainable"] == "nothing"


@pytest.mark.parametrize("name", [n for n, f in FILES.items() if f.declaration.trains])
def test_every_trained_method_says_how_much_trains(name):
    assert trainable(FILES[name].path), (
        f"{name}: no sentence `Trainable per matrix: ...` in the docstring of its file"
    )


@pytest.mark.parametrize("name", list(FILES))
def test_moments_are_those_of_the_imported_file(name):
    module = load_method(FILES[name].path)
    found = {moment for moment in MOMENTS if callable(getattr(module, moment, None))}
    listed = {moment for moment in MOMENTS if moment in FILES[name].defines}
    # What a library module gives (moments of a family) is not seen without importing it.
    assert listed <= found
    assert found - listed <= {m for m in found if getattr(module, m).__module__[:8] == "ballast."}


def test_twins_are_methods_and_configurations_that_exist():
    import peft

    assert set(TWINS) <= set(FILES)
    for name, twin in TWINS.items():
        module = load_method(FILES[name].path)
        hyper = module.Hyper() if hasattr(module, "Hyper") else None
        kind = getattr(peft, twin.config)
        options = twin.options(4, hyper)
        assert set(options) <= set(kind.__dataclass_fields__), name


def test_the_overhead_is_read_where_most_was_measured(tmp_path):
    path = tmp_path / OVERHEAD
    assert overhead(path) == ({}, "")
    rows = [
        {"method": "lora", "hidden": 512, "tokens": 256, "dtype": "fp32", "ours_over_base": 1.234},
        {"method": "dora", "hidden": 512, "tokens": 256, "dtype": "fp32", "ours_over_base": ""},
        {"method": "dora", "hidden": 2048, "tokens": 256, "dtype": "fp32", "ours_over_base": 9},
    ]
    rows[0]["peft_over_base"] = 1.5
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    assert overhead(path) == ({"lora": "1.23 (1.50)"}, "hidden 512, 256 tokens, fp32")


def test_the_command_prints_or_writes(tmp_path, capsys, monkeypatch):
    (tmp_path / "methods").mkdir()
    for name in ("lora", "rslora"):
        text = (METHODS / f"{name}.py").read_text()
        (tmp_path / "methods" / f"{name}.py").write_text(text)
    monkeypatch.setattr(Layout, "here", classmethod(lambda cls: cls(tmp_path, tmp_path)))
    assert cli.main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert set(_rows(printed)) == {"lora", "rslora"}
    assert cli.main(["methods", "--write"]) == 0
    assert (tmp_path / "methods" / PAGE).read_text() == printed.removesuffix("\n")
