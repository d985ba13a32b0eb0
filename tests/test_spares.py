"""Spare copies of records: put back when a finished cell lost its record, and only then."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from ballast import spares
from ballast.files import sha256_file, write_sealed
from ballast.layout import Layout
from ballast.outcome import RECORD, cell_folder
from ballast.records import read_path
from ballast.status import forget_failed
from fake_records import failed, plan_of, record

ITEMS = "items.parquet"


class Cell:
    """A finished cell in a folder, its record spared and then removed, as Snakemake does."""

    def __init__(self, root: Path, found: dict | None = None) -> None:
        found = found or record()
        self.layout = Layout(root, root / "results")
        self.row = plan_of([found]).iloc[0].to_dict()
        self.folder = cell_folder(self.row, self.layout)
        self.folder.mkdir(parents=True)
        (self.folder / "adapter.safetensors").write_bytes(b"an adapter")
        (self.folder / ITEMS).write_bytes(b"scored items")
        found["files"] = {"adapter.safetensors": "00", ITEMS: sha256_file(self.folder / ITEMS)}
        self.record = self.folder / RECORD
        write_sealed(self.record, found)
        self.before = self.record.read_bytes()
        spares.keep_record(self.row, self.layout)
        self.record.unlink()

    def restored(self, **changes: str) -> bool:
        return spares.restore_record(self.row | changes, self.layout)


@pytest.fixture
def cell(tmp_path) -> Cell:
    return Cell(tmp_path)


def test_a_removed_record_comes_back_to_the_byte(cell):
    assert cell.restored()
    assert cell.record.read_bytes() == cell.before


def test_nothing_comes_back_where_nothing_was_finished(tmp_path):
    assert not spares.restore(tmp_path / "curve.json")


def test_a_failure_comes_back_until_it_is_tried_again(tmp_path):
    """Its retries were spent; SLURM called the job out of memory all the same."""
    cell = Cell(tmp_path, failed(record()))
    assert cell.restored()
    assert cell.record.read_bytes() == cell.before
    plan = pd.DataFrame([cell.row])
    assert forget_failed(plan, cell.layout, "tiny") == [cell.row["id"]]
    assert not cell.restored()


def test_a_run_that_makes_what_is_there_again_has_a_reason(cell):
    """Copies go when it starts; that of a record which its groups lost stays."""
    spares.drop_spares(cell.layout.suite("tiny"))
    assert cell.restored()
    spares.drop_spares(cell.layout.suite("tiny"))
    cell.record.unlink()
    assert not cell.restored()


def test_a_record_of_other_weights_of_its_parent_does_not_come_back(tmp_path):
    parent = Cell(tmp_path, record(method="full_st", rank=None))
    assert parent.restored()
    child = record(method="wise_ft", rank=None)
    child["identity"]["parents"] = [parent.row["id"]]
    child["provenance"]["parents"] = {parent.row["id"]: "00"}
    cell = Cell(tmp_path, child)
    assert cell.restored()
    trained = read_path(parent.record)
    trained["files"]["adapter.safetensors"] = "11"
    write_sealed(parent.record, trained)
    assert not cell.restored()


@pytest.mark.parametrize("changed", ["train_key", "eval_key"])
def test_a_record_of_other_settings_or_scores_does_not_come_back(cell, changed):
    assert not cell.restored(**{changed: "another"})
    assert not cell.record.exists()


@pytest.mark.parametrize("name", ["adapter.safetensors", ITEMS])
def test_a_record_whose_files_are_gone_does_not_come_back(cell, name):
    (cell.folder / name).unlink()
    assert not cell.restored()


def test_a_record_whose_items_changed_does_not_come_back(cell):
    (cell.folder / ITEMS).write_bytes(b"scored otherwise")
    assert not cell.restored()


def test_a_damaged_copy_is_not_used(cell):
    [copy] = [path for path in cell.folder.iterdir() if path.name.startswith(f".{RECORD}")]
    assert "60.0" in copy.read_text()
    copy.write_text(copy.read_text().replace("60.0", "90.0"))
    assert not cell.restored()
    copy.write_text("{")
    assert not cell.restored()


def test_the_copy_follows_the_last_record(cell):
    assert cell.restored()
    found = read_path(cell.record)
    found["costs"]["tokens"] = 7
    write_sealed(cell.record, found)
    spares.keep_record(cell.row, cell.layout)
    cell.record.unlink()
    assert cell.restored()
    assert json.loads(cell.record.read_text())["costs"]["tokens"] == 7


def test_a_curve_comes_back_too(tmp_path):
    path = tmp_path / "curve.json"
    write_sealed(path, {"points": [1.0]})
    before = path.read_bytes()
    spares.keep(path)
    path.unlink()
    assert spares.restore(path)
    assert path.read_bytes() == before
