"""Bundles and community results: what comes in is checked, and what is there stays."""

from __future__ import annotations

import copy
import json
import math
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ballast.community import (
    bundle,
    bundle_checks,
    bundle_tables,
    merge,
    pack,
    read_community,
    read_community_changes,
    revisions,
)
from ballast.community.bundle import read_bundle, write_bundle
from ballast.community.control import normalised
from ballast.errors import DataError
from ballast.files import SUMS, sha256_file
from ballast.results import ITEM_COLUMNS, Results
from ballast.tables import tidy
from fake_records import failed, record
from fake_results import fake_results
from kept_fakes import keep_fake

SUITE = "tiny"


@pytest.fixture(scope="module")
def results() -> Results:
    return fake_results(methods=2, ranks=(2, 8), seeds=2, items=20)


@pytest.fixture(scope="module")
def kept(results, tmp_path_factory) -> Path:
    return keep_fake(results, tmp_path_factory.mktemp("kept") / SUITE)


@pytest.fixture(scope="module")
def good(kept, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("good") / "good.zip"
    pack(kept, file, "lab")
    return file


@pytest.fixture
def suite(tmp_path) -> Path:
    """A suite's folder with an empty inbox."""
    (tmp_path / SUITE / "incoming").mkdir(parents=True)
    return tmp_path / SUITE


def rewrite(good: Path, file: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A bundle whose members `change` has changed, with a manifest that agrees to them."""
    with zipfile.ZipFile(good) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    return write_zip(file, sealed(members))


def sealed(members: dict[str, bytes]) -> dict[str, bytes]:
    from hashlib import sha256

    manifest = json.loads(members["manifest.json"])
    for name in manifest["members"]:
        data = members[name]
        manifest["members"][name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    return members | {"manifest.json": json.dumps(manifest).encode()}


def write_zip(file: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file


def table_bytes(table: pd.DataFrame) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pandas(table, preserve_index=False), buffer)
    return buffer.getvalue().to_pybytes()


def with_records(change: Callable[[list[dict]], Any]) -> Callable[[dict[str, bytes]], None]:
    """A change of the parsed records; `change` may return texts to be written as they are."""

    def apply(members: dict[str, bytes]) -> None:
        table = pq.read_table(pa.BufferReader(members["records.parquet"])).to_pandas()
        found = [json.loads(text) for text in table["record"]]
        texts = change(found) or [json.dumps(one) for one in found]
        ids = [one["id"] for one in found]
        members["records.parquet"] = table_bytes(pd.DataFrame({"id": ids, "record": texts}))
        manifest = json.loads(members["manifest.json"]) | {"records": len(ids)}
        members["manifest.json"] = json.dumps(manifest).encode()

    return apply


def with_items(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[dict], None]:
    def apply(members: dict[str, bytes]) -> None:
        items = pq.read_table(pa.BufferReader(members["items.parquet"])).to_pandas()
        members["items.parquet"] = table_bytes(change(items))

    return apply


def with_manifest(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    def apply(members: dict[str, bytes]) -> None:
        manifest = json.loads(members["manifest.json"]) | changes
        members["manifest.json"] = json.dumps(manifest).encode()

    return apply


def first(change: Callable[[dict], Any]) -> Callable[[dict[str, bytes]], None]:
    """A change of the first record alone."""
    return with_records(lambda records: change(records[0]) and None)


# Packing and merging.


def test_round_trip(results, kept, good, suite):
    (suite / "incoming/a.zip").write_bytes(good.read_bytes())
    report = merge(suite / "incoming", suite)
    assert report.lines() == ["lab: 8 records merged, 0 already there"]
    records, items = read_community(suite)
    assert [r["id"] for r in records] == sorted(f"lab:{name}" for name in results.records)
    assert {r["origin"] for r in records} == {"lab"}
    for found in records:
        own = results.records[found["id"].removeprefix("lab:")]
        assert found == own | {"id": found["id"], "identity": found["identity"], "origin": "lab"}
    assert tuple(items.columns) == ITEM_COLUMNS
    keys = ["cell", "task", "item"]
    ours = results.items.assign(cell="lab:" + results.items["cell"].astype(str))
    ours = ours.astype({"task": object}).sort_values(keys, ignore_index=True)
    theirs = items.sort_values(keys, ignore_index=True)
    for name in ITEM_COLUMNS:
        assert np.array_equal(theirs[name].to_numpy(), ours[name].astype(theirs[name].dtype))
    assert len(tidy(records, None)) == len(records)


def test_the_same_results_pack_to_the_same_bytes(kept, good, tmp_path):
    again = tmp_path / "again.zip"
    assert write_bundle(kept, again, "lab") == 8
    assert again.read_bytes() == good.read_bytes()
    os.utime(kept / "records.parquet", (1, 1))
    write_bundle(kept, again, "lab")
    assert sha256_file(again) == sha256_file(good)


def test_the_manifest_names_the_hardware_once(good):
    with zipfile.ZipFile(good) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    assert manifest["hardware"] == [dict.fromkeys(bundle.HARDWARE)]
    assert (manifest["origin"], manifest["suite"], manifest["records"]) == ("lab", SUITE, 8)


@pytest.mark.parametrize("origin", ["", "../x", "a b", ".hidden", "x" * 65, "a/b", "ü", "a\n"])
def test_an_origin_is_a_plain_name(kept, tmp_path, origin):
    with pytest.raises(DataError, match="origin"):
        write_bundle(kept, tmp_path / "x.zip", origin)
    assert not (tmp_path / "x.zip").exists()


def test_merging_again_changes_no_byte(good, suite):
    (suite / "incoming/a.zip").write_bytes(good.read_bytes())
    merge(suite / "incoming", suite)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in suite.rglob("*.parquet")}
    report = merge(suite / "incoming", suite)
    assert report.lines() == ["lab: 0 records merged, 8 already there"]
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in suite.rglob("*.parquet")} == before


def test_an_empty_inbox_says_where_bundles_go(suite):
    (line,) = merge(suite / "incoming", suite).lines()
    assert str(suite / "incoming") in line
    assert "ballast pack" in line
    assert merge(suite / "nothing", suite).lines() != []
    assert read_community(suite)[0] == []
    assert list(read_community(suite)[1].columns) == list(ITEM_COLUMNS)


def test_the_good_are_merged_beside_the_bad(good, suite):
    inbox = suite / "incoming"
    (inbox / "b.zip").write_bytes(good.read_bytes())
    (inbox / "a.zip").write_bytes(good.read_bytes()[:-7])
    (inbox / "c<b>\n.zip").write_bytes(b"PK")
    (inbox / ".hidden").write_bytes(b"x")
    report = merge(inbox, suite)
    assert report.added == {"lab": 8}
    assert [line.split(":")[0] for line in report.refused] == ["a.zip", "c<b> .zip"]
    assert all("\n" not in line for line in report.lines())


def test_another_origin_is_kept_beside(kept, suite):
    for origin in ("lab", "home"):
        pack(kept, suite / "incoming" / f"{origin}.zip", origin)
    merge(suite / "incoming", suite)
    records, _ = read_community(suite)
    assert len(records) == 16
    assert len({r["id"] for r in records}) == 16
    pack(kept, suite / "incoming/case.zip", "LAB")
    (line,) = merge(suite / "incoming", suite).refused
    assert "differs in case alone" in line


def test_parents_are_of_the_same_origin(kept, good, suite, tmp_path):
    def apply(records: list[dict]) -> None:
        records[1]["identity"]["parents"] = [records[0]["id"]]

    merge(rewrite(good, tmp_path / "x.zip", with_records(apply)), suite)
    records, _ = read_community(suite)
    known = {r["id"] for r in records}
    parents = [p for r in records for p in r["identity"]["parents"]]
    assert len(parents) == 1
    assert set(parents) <= known


def test_a_failed_record_is_merged_with_its_reason(tmp_path, results):
    bad = failed(record(seed=7))
    both = Results(SUITE, results.table, results.records | {bad["id"]: bad}, results.items)
    keep_fake(both, tmp_path / "kept" / SUITE)
    pack(tmp_path / "kept" / SUITE, tmp_path / "x.zip", "lab")
    merge(tmp_path / "x.zip", tmp_path / SUITE)
    records, items = read_community(tmp_path / SUITE)
    assert [r["failure"]["reason"] for r in records if r["status"] == "failed"] == ["loss is NaN"]
    assert f"lab:{bad['id']}" not in set(items["cell"])


# What is refused. Each of these is one line, and nothing is written.

REFUSED: dict[str, tuple[Callable[[dict[str, bytes]], Any], str]] = {
    "schema": (first(lambda r: r.pop("costs")), "costs"),
    "unknown field": (first(lambda r: r.update(extra=1)), "extra"),
    "NaN": (first(lambda r: r["scores"]["codes"].update(value=math.nan)), "finite"),
    "infinity": (first(lambda r: r["costs"].update(step_ms=math.inf)), "finite"),
    "out of range": (first(lambda r: r["scores"]["codes"].update(value=101.0)), "0 to 100"),
    "huge number": (first(lambda r: r["report"].update(x=10**400)), "63 bits"),
    "id": (first(lambda r: r.update(id="a/b")), "id"),
    "long id": (first(lambda r: r.update(id="x" * 250)), "id"),
    "other suite": (first(lambda r: r["identity"].update(suite="other")), "identity.suite"),
    "other origin": (first(lambda r: r.update(origin="else")), "origin"),
    "line break in a name": (first(lambda r: r["method"].update(title="a\nb")), "not a name"),
    "terminal codes": (first(lambda r: r["method"].update(title="\x1b[31m")), "not a name"),
    "text turned round": (first(lambda r: r["method"].update(title="a\u202eb")), "not a name"),
    "half a character": (first(lambda r: r["method"].update(title="\ud800")), "half of a"),
    "long name": (first(lambda r: r["method"].update(title="x" * 201)), "not a name"),
    "many names": (
        first(lambda r: r["report"].update({f"n{i}": 0.0 for i in range(600)})), "names",
    ),
    "many values": (
        first(lambda r: r["settings"].update(x=[0] * 20_001)), "values",
    ),
    "large record": (
        first(lambda r: r["settings"].update(x="y" * (2**20 + 1))), "too many characters",
    ),
    "twice": (with_records(lambda records: records.append(records[0])), "twice"),
    "not JSON": (with_records(lambda records: ["{"] * len(records)), "not a bundle"),
    "deep": (with_records(lambda r: ["[" * 100_000] * len(r)), "not a bundle"),
    "no object": (with_records(lambda r: ["3"] * len(r)), "not its record's id"),
    "item twice": (with_items(lambda t: pd.concat([t, t.iloc[:1]])), "items"),
    "item for another": (
        with_items(lambda t: t.assign(item=t["item"].replace(1, 0))), "19 different items of 20",
    ),
    "item gone": (with_items(lambda t: t.iloc[1:]), "its record has 20"),
    "score": (with_items(lambda t: t.assign(score=2.0)), "score is not in 0 to 1"),
    "score NaN": (with_items(lambda t: t.assign(score=np.nan)), "score is missing"),
    "score text": (with_items(lambda t: t.assign(score="x")), "score is not of numbers"),
    "score not the items'": (with_items(lambda t: t.assign(score=0.5)), "record's score"),
    "form": (with_items(lambda t: t.assign(form=9)), "form is not in"),
    "loss": (with_items(lambda t: t.assign(loss=-1.0)), "loss is not in"),
    "unknown cell": (
        with_items(lambda t: t.assign(cell=t["cell"].astype(str) + "x")), "no record",
    ),
    "column": (with_items(lambda t: t.assign(evil=1)), "'evil' is not expected"),
    "no column": (with_items(lambda t: t.drop(columns="task")), "task is missing"),
    "changes": (lambda m: m.update({"changes.parquet": b"x"}), "does not name it"),
    "no parquet": (lambda m: m.update({"items.parquet": b"PAR1 no"}), "parquet"),
    "format": (with_manifest(format=2), "manifest.json.format"),
    "kind": (with_manifest(kind="x"), "manifest.json.kind"),
    "origin's form": (with_manifest(origin="../.."), "manifest.json.origin"),
    "count": (with_manifest(records=3), "its manifest says 3"),
    "manifest's field": (with_manifest(more=1), "manifest.json"),
}  # fmt: skip


@pytest.fixture(scope="module")
def exact(results, tmp_path_factory) -> Path:
    """A bundle whose target is scored by a metric that is the mean of its items."""
    changed = copy.deepcopy(results.records)
    for found in changed.values():
        found["tasks"]["codes"]["metric"] = "exact_match"
    folder = tmp_path_factory.mktemp("exact")
    keep_fake(Results(SUITE, results.table, changed, results.items), folder / SUITE)
    pack(folder / SUITE, folder / "exact.zip", "lab")
    return folder / "exact.zip"


@pytest.mark.parametrize("name", REFUSED)
def test_refused(exact, suite, tmp_path, name):
    change, said = REFUSED[name]
    file = rewrite(exact, tmp_path / "x.zip", change)
    report = merge(file, suite)
    (line,) = report.refused
    assert said in line
    assert len(line) < 450
    assert line.isprintable()
    assert not (suite / "community").exists()


ENTRY = {"item": 3, "question": "q", "reference": "r", "before": "b", "after": "<b>"}


def with_changes(results: Results, folder: Path, **other: Any) -> Path:
    """The kept suite with one changed answer."""
    row = {"cell": next(iter(results.records)), "task": "codes", "kind": "gained"}
    row |= {"entry": json.dumps(ENTRY)} | other
    keep_fake(results, folder)
    pd.DataFrame([row]).to_parquet(folder / "changes.parquet", index=False)
    return folder


def test_changed_answers_go_with_their_records(results, tmp_path):
    from ballast.keep import read_kept_changes

    kept = with_changes(results, tmp_path / "kept" / SUITE)
    pack(kept, tmp_path / "x.zip", "lab")
    assert read_community_changes(tmp_path / SUITE).empty
    merge(tmp_path / "x.zip", tmp_path / SUITE)
    (found,) = read_community_changes(tmp_path / SUITE).to_dict("records")
    (own,) = read_kept_changes(kept).to_dict("records")
    assert found == own | {"cell": f"lab:{own['cell']}"}
    assert found["entry"] == ENTRY


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"cell": "other"}, "no record has such a task"),
        ({"task": "other"}, "no record has such a task"),
        ({"kind": "lost"}, "gained or forgotten"),
        ({"entry": "[]"}, "an entry has item"),
        ({"entry": "{"}, "not a bundle"),
        ({"entry": json.dumps(ENTRY | {"more": 1})}, "an entry has item"),
        ({"entry": json.dumps(ENTRY | {"after": 3})}, "four texts"),
        ({"entry": json.dumps(ENTRY | {"after": "x" * 20_000})}, "too many characters"),
        ({"entry": json.dumps(ENTRY | {"after": "\ud800"})}, "not a bundle"),
        ({"entry": 3}, "are texts"),
        ({"evil": "x"}, "'evil' is not expected"),
    ],
)
def test_changed_answers_that_are_refused(results, tmp_path, other, said):
    with pytest.raises(DataError, match=said):
        pack(with_changes(results, tmp_path / SUITE, **other), tmp_path / "x.zip", "lab")
    assert not (tmp_path / "x.zip").exists()


def test_tampered_bytes_are_refused(good, suite, tmp_path):
    """Whatever byte of a member is turned, its checksum or its hash does not agree."""
    data = bytearray(good.read_bytes())
    for at in np.random.default_rng(0).integers(200, len(data) - 400, 25):
        turned = bytearray(data)
        turned[at] ^= 0xFF
        (tmp_path / "x.zip").write_bytes(turned)
        report = merge(tmp_path / "x.zip", suite)
        assert len(report.refused) == 1, at
    assert not (suite / "community").exists()


def test_a_wrong_hash_is_refused(good, suite, tmp_path):
    with zipfile.ZipFile(good) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(members["manifest.json"])
    digest = manifest["members"]["items.parquet"]["sha256"]
    manifest["members"]["items.parquet"]["sha256"] = digest[::-1]
    members["manifest.json"] = json.dumps(manifest).encode()
    with pytest.raises(DataError, match=r"items\.parquet: its hash is not the manifest's"):
        read_bundle(write_zip(tmp_path / "x.zip", members))
    manifest["members"]["items.parquet"] |= {"bytes": 3}
    members["manifest.json"] = json.dumps(manifest).encode()
    with pytest.raises(DataError, match="its manifest says otherwise"):
        read_bundle(write_zip(tmp_path / "x.zip", members))


@pytest.mark.parametrize(
    "name", ["../../evil", "/etc/evil", "C:\\evil", "records.parquet/../x", "a\x00b", "extra.txt"]
)
def test_members_with_other_names_are_refused(good, suite, tmp_path, name):
    with zipfile.ZipFile(good) as archive:
        members = {entry: archive.read(entry) for entry in archive.namelist()}
    file = write_zip(tmp_path / "x.zip", members | {name: b"x"})
    before = set(tmp_path.rglob("*"))
    (line,) = merge(file, suite).refused
    assert "not a member of a bundle" in line
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice_a_link_or_a_missing_one_is_refused(good, suite, tmp_path):
    with zipfile.ZipFile(good) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in [*members.items(), ("items.parquet", b"x")]:
            archive.writestr(name, data)
    assert "twice" in merge(tmp_path / "x.zip", suite).refused[0]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in members.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, data)
    assert "a link" in merge(tmp_path / "x.zip", suite).refused[0]
    del members["items.parquet"]
    write_zip(tmp_path / "x.zip", members)
    assert "without items.parquet" in merge(tmp_path / "x.zip", suite).refused[0]


def test_a_linked_file_and_a_folder_are_refused(good, suite):
    (suite / "incoming/link.zip").symlink_to(good)
    (suite / "incoming/folder.zip").mkdir()
    report = merge(suite / "incoming", suite)
    assert [("not a plain file" in line) for line in report.refused] == [True, True]


@pytest.mark.parametrize(
    ("limit", "value", "said"),
    [
        ("file", 1000, "a bundle has at most 1,000"),
        ("unpacked", 1000, "at most 1,000"),
        ("manifest", 100, "manifest.json"),
        ("records", 7, "at most 7"),
        ("items", 100, "at most 100"),
        ("texts", 10_000, "too many characters"),
    ],
)
def test_size_limits(good, suite, monkeypatch, limit, value, said):
    small = bundle_checks.Limits(**{limit: value})
    for module in (bundle, bundle_checks, bundle_tables):
        monkeypatch.setattr(module, "LIMITS", small)
    (line,) = merge(good, suite).refused
    assert said in line


def test_a_bomb_is_refused_before_it_is_unpacked(good, suite, tmp_path):
    """Two gigabytes of zeros in two megabytes."""
    with zipfile.ZipFile(good) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("manifest.json", members["manifest.json"])
        archive.writestr("records.parquet", members["records.parquet"])
        with archive.open("items.parquet", "w", force_zip64=True) as member:
            block = bytes(2**24)
            for _ in range(66):
                member.write(block)
    assert (tmp_path / "x.zip").stat().st_size < 2**24
    (line,) = merge(tmp_path / "x.zip", suite).refused
    assert "bytes unpacked; at most 1,073,741,824" in line


def test_a_parquet_that_repeats_a_text_is_refused_by_its_rows(good, suite, tmp_path, monkeypatch):
    rows = pa.array(np.zeros(3_000_000, dtype=np.int32))
    text = pa.DictionaryArray.from_arrays(rows, pa.array(["x" * 1000]))
    table = pa.table({"cell": text, "task": text, "item": rows, "score": rows.cast("float32")})

    def apply(members: dict[str, bytes]) -> None:
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        members["items.parquet"] = buffer.getvalue().to_pybytes()

    file = rewrite(good, tmp_path / "x.zip", apply)
    assert file.stat().st_size < 1_000_000  # of six gigabytes of text
    monkeypatch.setattr(bundle_tables, "LIMITS", bundle_checks.Limits(items=2_000_000))
    assert "3,000,000 rows" in merge(file, suite).refused[0]


def test_a_long_table_of_contents_is_not_even_read(suite, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i in range(200):
            archive.writestr(f"{i}", b"")
    assert "too many members" in merge(tmp_path / "x.zip", suite).refused[0]


def test_results_of_another_suite_are_refused(good, tmp_path):
    (line,) = merge(good, tmp_path / "other").refused
    assert "results of suite 'tiny', not of 'other'" in line


def test_a_damaged_suite_cannot_be_packed(results, tmp_path):
    wrong = results.items.assign(score=results.items["score"].where(results.items["item"] > 0, 7.0))
    folder = keep_fake(Results(SUITE, results.table, results.records, wrong), tmp_path / SUITE)
    with pytest.raises(DataError, match="score is not in 0 to 1"):
        pack(folder, tmp_path / "x.zip", "lab")
    assert not (tmp_path / "x.zip").exists()


# What is there stays.

VERSIONS = st.lists(
    st.tuples(
        st.sampled_from(["lab", "home"]),
        st.dictionaries(st.integers(0, 3), st.integers(0, 2), min_size=1),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sent=VERSIONS)
def test_nothing_is_ever_overwritten(tmp_path_factory, sent):
    """Bundles with versions of records in any order: the first of an origin and id stays."""
    home = tmp_path_factory.mktemp("home")
    first: dict[tuple[str, int], int] = {}
    for at, (origin, versions) in enumerate(sent):
        records = {}
        for number, version in versions.items():
            found = record(seed=number)
            found["report"] = {"version": float(version)}
            records[found["id"]] = found
        empty = pd.DataFrame({"cell": [], "task": [], "item": [], "score": []})
        empty = empty.astype({"cell": str, "task": str, "item": "int32", "score": "float32"})
        keep_fake(Results(SUITE, pd.DataFrame(), records, empty), home / f"{at}" / SUITE)
        pack(home / f"{at}" / SUITE, home / f"{at}.zip", origin)
        report = merge(home / f"{at}.zip", home / SUITE)
        others = [n for n, v in versions.items() if first.get((origin, n), v) != v]
        assert len(report.refused) == len(others)
        assert report.added[origin] == sum((origin, n) not in first for n in versions)
        for number, version in versions.items():
            first.setdefault((origin, number), version)
    found, _ = read_community(home / SUITE)
    stored = {(r["origin"], r["identity"]["seed"]): int(r["report"]["version"]) for r in found}
    assert stored == first


def test_other_items_of_the_same_record_are_refused(results, good, suite, tmp_path):
    merge(good, suite)
    before = (suite / "community/lab/items.parquet").read_bytes()
    turned = rewrite(
        good, tmp_path / "x.zip", with_items(lambda t: t.assign(loss=t["loss"] + 1))
    )  # fmt: skip
    report = merge(turned, suite)
    assert len(report.refused) == 8
    assert all("it stays" in line for line in report.refused)
    assert (suite / "community/lab/items.parquet").read_bytes() == before
    shuffled = rewrite(good, tmp_path / "y.zip", with_items(lambda t: t.iloc[::-1]))
    assert merge(shuffled, suite).known == {"lab": 8}


def test_damage_of_what_was_merged_is_told(good, suite):
    merge(good, suite)
    path = suite / "community/lab/records.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="damaged"):
        read_community(suite)
    problems: list[str] = []
    assert read_community(suite, problems)[0] == []
    assert len(problems) == 1
    assert "damaged" in merge(good, suite).refused[0]


def test_a_merge_that_was_cut_short_is_finished_by_the_next(good, suite):
    merge(good, suite)
    for name in ("records.parquet", SUMS):  # written last, in this order
        (suite / "community/lab" / name).unlink()
    assert read_community(suite)[0] == []
    assert merge(good, suite).added == {"lab": 8}
    assert len(read_community(suite)[1]) == len(read_bundle(good).items)


# Beside our own.


def test_revisions_are_labelled():
    own, same, other = record(), record(seed=1), record(seed=2)
    other["keys"] |= {"base": "b2", "data": "d2"}
    other["method"]["digest"] = "x"
    weights = {"files": {"model.safetensors": "1", "config.json": "c"}}
    own["provenance"]["base"] = weights
    same["provenance"]["base"] = {"files": weights["files"] | {"config.json": "other"}}
    changed = record(seed=3)
    changed["provenance"]["base"] = {"files": {"model.safetensors": "2"}}
    found = revisions([own], [same, other, changed])
    assert set(found) == {other["id"], changed["id"]}
    assert found[other["id"]] == (
        "another revision of the base; another revision of the data; "
        "another version of the method's file"
    )
    assert found[changed["id"]] == "the base has other weights"
    assert revisions([], [own, other]) == {}


def on(machine: str | None, origin: str, method: str, seconds: float, **other: Any) -> dict:
    found = record(method, **other)
    found["id"] = f"{origin}:{found['id']}" if origin else found["id"]
    found["costs"]["seconds"]["train"] = seconds
    found["provenance"] = {"device": machine, "processor": "p", "threads": 1} if machine else {}
    return found | ({"origin": origin} if origin else {})


def relative(records: list[dict], **kinds: Any) -> pd.DataFrame:
    table = tidy(records, None)
    found = normalised(table, {r["id"]: r for r in records}, **kinds)
    assert found.index.equals(table.index)
    return found.set_axis(table["id"]).reindex([r["id"] for r in records])


def test_costs_are_relative_to_the_control_of_the_same_machine():
    records = [
        on("gpu", "", "lora", 10, seed=0, e=50), on("gpu", "", "lora", 20, seed=1, e=60),
        on("gpu", "", "dora", 30, e=65, f=-4),
        on("slow", "lab", "lora", 100), on("slow", "lab", "dora", 200),
        on("other", "lab", "dora", 200, seed=1),
        on(None, "lab", "pissa", 200),
    ]  # fmt: skip
    found = relative(records)
    ratios = found["relative.seconds.train"].tolist()
    assert ratios[:5] == [10 / 15, 20 / 15, 2, 1, 2]
    assert all(math.isnan(value) for value in ratios[5:])
    assert found["control"].tolist()[:5] == ["lora-r8"] * 3 + ["lora-r8@lab"] * 2
    assert found["control"].isna().tolist()[5:] == [True, True]
    assert found["control_n"].tolist()[:4] == [2, 2, 2, 1]
    assert found["to_control.E"].tolist()[2] == 10
    assert found["to_control.F"].tolist()[2] == 6
    assert found["relative.memory_mb.train"].tolist()[2] == 1


def test_a_control_is_of_the_same_place_and_revision():
    records = [on("gpu", "", "lora", 10), on("gpu", "", "dora", 20)]
    for change in (
        lambda r: r["keys"].update(base="b2"), lambda r: r["keys"].update(data="d2"),
        lambda r: r["identity"].update(target="other"), lambda r: r["identity"].update(base="x"),
        lambda r: r["provenance"].update(processor="q"),
        lambda r: r["provenance"].update(threads=2),
    ):  # fmt: skip
        both = copy.deepcopy(records)
        change(both[1])
        assert relative(both)["control"].isna().tolist() == [False, True]


def test_the_control_has_the_nearest_rank_and_no_variant():
    records = [
        on("gpu", "", "lora", 10, rank=2), on("gpu", "", "lora", 20, rank=16),
        on("gpu", "", "lora", 99, rank=8, variant="odd"), failed(on("gpu", "", "lora", 1, rank=8)),
        on("gpu", "", "dora", 40, rank=16), on("gpu", "", "dora", 40, rank=4),
        on("gpu", "", "ia3", 40, rank=None), failed(on("gpu", "", "pissa", 40)),
    ]  # fmt: skip
    found = relative(records)
    assert found["control"].tolist()[4:7] == ["lora-r16", "lora-r2", "lora-r2"]
    assert found["relative.seconds.train"].tolist()[4:6] == [2, 4]
    assert math.isnan(found["relative.seconds.train"].iloc[7])
    assert set(relative(records, control="lora-r16")["control"]) == {"lora-r16"}
