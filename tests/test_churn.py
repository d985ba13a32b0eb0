"""Churn per item: counts against loops, forms, changed answers, and what cells store and keep."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ballast import keep, versions
from ballast.churn import (
    ANSWER,
    EMPTY,
    FORMS,
    LIKELY,
    LONGEST,
    MOST_SUBJECTS,
    OTHER,
    changes_of,
    churn_of,
    cut,
    forms,
)
from ballast.errors import DataError, SuiteError
from ballast.files import read_json, sha256_file, write_json
from ballast.items import CHANGES, ITEMS, SCHEMA, beside_base, items_of, write_items
from ballast.records import validate_record
from ballast.results import ITEM_COLUMNS
from ballast.tasks import Task, read_task
from checkout import Checkout
from fake_records import failed, record

# --- counts --------------------------------------------------------------------------------------

# base_score, score, form, loss: what the item counts as
HAND = [
    (1.0, 1.0, ANSWER, 0.1, ["kept"]),
    (0.5, 0.75, OTHER, 9.0, ["kept"]),
    (0.0, 1.0, ANSWER, 0.1, ["gained"]),
    (0.49, 0.5, EMPTY, 3.0, ["gained"]),
    (0.0, 0.49, EMPTY, 0.1, ["never"]),
    (1.0, 0.0, ANSWER, 2.0, ["forgotten"]),
    (1.0, 0.0, OTHER, 2.0, ["forgotten", "forgotten_form"]),
    (1.0, 0.4, EMPTY, LIKELY, ["forgotten", "forgotten_form", "forgotten_likely"]),
    (0.6, 0.0, ANSWER, 0.69, ["forgotten", "forgotten_likely"]),
    (1.0, 0.0, ANSWER, 0.70, ["forgotten"]),
    (1.0, 0.0, ANSWER, math.nan, ["forgotten"]),
]
COUNTS = ("n", "kept", "gained", "forgotten", "never", "forgotten_form", "forgotten_likely")


def table(rows, subjects=None) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["base_score", "score", "form", "loss"])
    frame["subject"] = subjects if subjects is not None else ""
    frame["item"] = np.arange(len(frame))
    return frame


def test_a_table_made_by_hand():
    wanted = {name: sum(name in row[-1] for row in HAND) for name in COUNTS} | {"n": len(HAND)}
    assert churn_of(table([row[:-1] for row in HAND])) == wanted
    assert wanted["forgotten_form"] == 2
    assert wanted["forgotten_likely"] == 2


ROW = st.tuples(
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.integers(0, len(FORMS) - 1),
    st.floats(0, 5),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(ROW, st.sampled_from(["", "a", "b", "c"])), min_size=1, max_size=30))
def test_counts_add_up_and_a_swap_swaps(drawn):
    rows, subjects = [row for row, _ in drawn], [subject for _, subject in drawn]
    items = table(rows, subjects)
    found = churn_of(items)
    split = ("kept", "gained", "forgotten", "never")
    assert sum(found[name] for name in split) == found["n"] == len(rows)
    assert max(found["forgotten_form"], found["forgotten_likely"]) <= found["forgotten"]
    loops = [(before >= 0.5, after >= 0.5) for before, after, _, _ in rows]
    assert [found[name] for name in split] == [
        loops.count(pair) for pair in ((True, True), (False, True), (True, False), (False, False))
    ]
    swapped = churn_of(items.rename(columns={"score": "base_score", "base_score": "score"}))
    assert [swapped[name] for name in split] == [
        found[name] for name in ("kept", "forgotten", "gained", "never")
    ]
    parts = found.get("subjects", {})
    assert list(parts) == sorted(set(subjects) - {""})
    for subject, part in parts.items():
        own = items[items["subject"] == subject]
        assert part == churn_of(own.assign(subject=""))


def test_a_column_of_numbers_is_no_subject():
    items = table([HAND[0][:-1]] * (MOST_SUBJECTS + 1))
    names = [f"row {i}" for i in range(len(items))]
    assert "subjects" not in churn_of(items.assign(subject=names))
    names[-1] = names[0]
    assert len(churn_of(items.assign(subject=names))["subjects"]) == MOST_SUBJECTS


# --- forms ---------------------------------------------------------------------------------------


def task_of(kind: str = "generate_until", **metadata) -> Task:
    return Task("t", Path(), {"output_type": kind, "metadata": metadata}, "")


def test_only_generated_answers_can_lack_a_form():
    for kind in ("multiple_choice", "loglikelihood_rolling", "classification", "masked_token"):
        assert list(forms(task_of(kind), [0, 1], [1, 1])) == [ANSWER, ANSWER]


def test_a_pattern_holds_for_the_whole_text_in_any_case():
    task = task_of(answer_pattern="[a-z]+( [a-z]+){1,2}")
    said = ["fox owl", " Fox\n  OWL ", "fox", "a b c d", "fox 7", "fox owl!", "", " \n\t"]
    found = [ANSWER, ANSWER, OTHER, OTHER, OTHER, OTHER, EMPTY, EMPTY]
    assert list(forms(task, said, ["fox owl"] * len(said))) == found


def test_answers_that_come_back_are_a_closed_set():
    references = ["yes", "no", "yes", "not  sure", "No", "not sure"]
    said = ["YES", "no", "maybe", "not\nsure", "", "yes no"]
    found = [ANSWER, ANSWER, OTHER, ANSWER, EMPTY, OTHER]
    assert list(forms(task_of(), said, references)) == found


@pytest.mark.parametrize(("distinct", "times", "closed"), [(100, 2, True), (101, 3, False)])
def test_more_than_a_hundred_answers_are_open(distinct, times, closed):
    references = [f"answer {i}" for i in range(distinct)] * times
    found = forms(task_of(), ["something else"] * len(references), references)
    assert set(found) == {OTHER if closed else ANSWER}


def test_answers_that_never_come_back_are_open():
    """A hundred images with a caption each have a hundred references, and say nothing of others."""
    references = [f"caption {i}" for i in range(60)]
    assert set(forms(task_of(), ["another"] * 60, references)) == {ANSWER}


@pytest.mark.parametrize("key", ["answer_pattern", "subject_pattern"])
@pytest.mark.parametrize("pattern", ["(", 3, "(a)(b)"])
def test_a_pattern_that_is_none_is_refused(key, pattern, tmp_path):
    path = tmp_path / "odd.yaml"
    metadata = {"metric": "exact_match", "unit": "points", "direction": "higher", "title": "t"}
    metadata |= {"source": {}, key: pattern}
    about = {"task": "odd", "output_type": "generate_until", "metadata": metadata}
    path.write_text(yaml.safe_dump(about))
    if key == "answer_pattern" and pattern == "(a)(b)":
        assert read_task(path).answer_pattern == pattern
        return
    with pytest.raises(SuiteError, match=rf"odd\.yaml: metadata\.{key}"):
        read_task(path)


# --- changes -------------------------------------------------------------------------------------


def says(item: int) -> dict[str, str]:
    return {"question": f"q{item}", "reference": "x" * 600, "before": "", "after": "é" * 500}


def test_the_first_changes_by_item_are_kept_and_cut():
    rows = [(i % 2, 1 - i % 2, 0, 1.0) for i in range(50)]
    items = table(rows)
    found = changes_of(items, says)
    assert [entry["item"] for entry in found["forgotten"]] == list(range(1, 20, 2))
    assert [entry["item"] for entry in found["gained"]] == list(range(0, 20, 2))
    first = found["gained"][0]
    assert list(first) == ["item", "question", "reference", "before", "after"]
    assert first["reference"] == "x" * (LONGEST - 1) + "…"
    assert first["after"] == "é" * LONGEST == cut("é" * LONGEST)
    shuffled = items.sample(frac=1, random_state=1)
    assert changes_of(shuffled, says) == found
    assert changes_of(items, says, most=3)["gained"] == found["gained"][:3]


def test_what_did_not_change_is_not_among_them():
    rows = [(1.0, 0.5, 0, 1.0), (0.4, 0.0, 2, 1.0)]
    assert changes_of(table(rows), says) == {"gained": [], "forgotten": []}


# --- items of many cells -------------------------------------------------------------------------


def cell_items(seed: int, n: int = 40) -> pd.DataFrame:
    draw = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "task": ["facts"] * (n // 2) + ["tales"] * (n - n // 2),
            "item": [*range(n // 2), *range(n - n // 2)],
            "subject": [["", "red", "blue"][i % 3] for i in range(n)],
            "score": draw.integers(0, 2, n) / 1.0,
            "loss": draw.random(n) * 3,
            "form": draw.integers(0, 3, n),
            "base_score": draw.integers(0, 2, n) / 1.0,
            "base_loss": draw.random(n),
            "base_form": 0,
        }
    )


def stored(cells: Path, seed: int) -> dict:
    """A record whose cell has items, changes and a sample file, written under `cells`."""
    found = record(seed=seed)
    found["tasks"] = {k: found["tasks"][k] for k in ("facts", "tales")}
    found["scores"] = {k: found["scores"][k] for k in found["tasks"]}
    found["base_scores"] = {k: found["base_scores"][k] for k in found["tasks"]}
    folder, items = cells / found["id"], cell_items(seed)
    write_items(items, folder / ITEMS)
    changes = {
        name: changes_of(part, lambda i: {"question": f"<b>{i}", "before": "…", "after": "\n"})
        for name, part in items.groupby("task")
    }
    write_json(folder / CHANGES, changes)
    files = [ITEMS, CHANGES]
    (folder / "samples").mkdir()
    for name, part in items.groupby("task"):
        part[["item", "score", "loss"]].to_parquet(folder / f"samples/{name}.parquet")
        files.append(f"samples/{name}.parquet")
    found["files"] = {name: sha256_file(folder / name) for name in files}
    write_json(folder / "run.json", found)
    return found


@pytest.fixture
def cells(tmp_path) -> tuple[Path, list[dict]]:
    folder = tmp_path / "suite/cells"
    return folder, [stored(folder, seed) for seed in range(3)]


def test_a_cells_file_has_the_columns_of_results():
    assert ("cell", *SCHEMA.names) == ITEM_COLUMNS


def test_items_of_many_cells_are_those_that_were_stored(cells):
    folder, records = cells
    found = items_of(folder, records)
    assert found.attrs["problems"] == []
    assert list(found.columns) == list(ITEM_COLUMNS)
    assert {found[name].dtype.name for name in ("cell", "task", "subject")} == {"category"}
    wanted = pd.concat(
        [cell_items(seed).assign(cell=records[seed]["id"]) for seed in range(3)], ignore_index=True
    )
    for name in ITEM_COLUMNS:
        kind = found[name].dtype if found[name].dtype != "category" else str
        assert (found[name].astype(kind) == wanted[name].astype(kind)).all(), name
    some = items_of(folder, records[1:], tasks=["tales"])
    assert set(some["task"]) == {"tales"}
    assert set(some["cell"]) == {r["id"] for r in records[1:]}
    assert len(some) == 40


def test_damaged_and_missing_files_are_problems_and_the_rest_is_read(cells):
    folder, records = cells
    first, second, third = (folder / r["id"] / ITEMS for r in records)
    first.write_bytes(first.read_bytes()[:-30])
    second.unlink()
    found = items_of(folder, records)
    assert set(found["cell"]) == {records[2]["id"]}
    damaged, missing = found.attrs["problems"]
    assert str(first) in damaged
    assert "not the file that the record describes" in damaged
    assert str(second) in missing
    assert "cannot be read" in missing
    pd.DataFrame({"task": ["facts"], "item": [1]}).to_parquet(third)
    own = sha256_file(third)
    records[2]["files"][ITEMS] = own
    (only,) = items_of(folder, records[2:]).attrs["problems"]
    assert "damaged" in only
    assert len(items_of(folder, records)) == 0


def test_another_cells_items_are_not_taken_for_its_own(cells):
    folder, records = cells
    write_items(cell_items(7), folder / records[0]["id"] / ITEMS)
    (problem,) = items_of(folder, records).attrs["problems"]
    assert "not the file that the record describes" in problem


def test_cells_without_items_have_none(cells):
    folder, records = cells
    bare = [failed(record(seed=9)), record(seed=8)]
    assert len(items_of(folder, [*records, *bare])) == 120
    empty = items_of(folder, bare)
    assert list(empty.columns) == list(ITEM_COLUMNS)
    assert empty.empty


def test_items_of_other_rows_are_not_set_beside():
    own = cell_items(0).assign(prediction="")
    assert list(beside_base("facts", own, own).columns) == SCHEMA.names
    with pytest.raises(DataError, match="scored on other items"):
        beside_base("facts", own, own.iloc[:-1])
    with pytest.raises(DataError, match="an earlier version"):
        beside_base("facts", own, own.drop(columns="form"))


# --- kept suites ---------------------------------------------------------------------------------


def test_a_kept_suite_gives_back_records_items_and_changes(cells, tmp_path):
    folder, records = cells
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / keep.CURVES).write_bytes(b"of a suite that had curves")
    assert keep.keep_suite(folder.parent, tmp_path / "kept") == 3
    found, items = keep.read_kept(tmp_path / "kept")
    assert found == records
    wanted = items_of(folder, records)
    for name in ("loss", "base_loss"):
        assert np.allclose(items[name], wanted[name], rtol=1e-3)
    rest = [name for name in ITEM_COLUMNS if not name.endswith("loss")]
    pd.testing.assert_frame_equal(items[rest].astype(wanted[rest].dtypes), wanted[rest])
    changes = keep.read_kept_changes(tmp_path / "kept")
    for row in changes.itertuples():
        own = read_json(folder / row.cell / CHANGES)[row.task][row.kind]
        assert row.entry in own
    assert len(changes) == sum(
        len(entries)
        for r in records
        for kinds in read_json(folder / r["id"] / CHANGES).values()
        for entries in kinds.values()
    )
    assert keep.read_kept_curves(tmp_path / "kept") is None
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    keep.keep_suite(folder.parent, tmp_path / "kept")
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before


def test_kept_changes_stay_within_their_bytes(cells, tmp_path, monkeypatch):
    folder, _ = cells
    keep.keep_suite(folder.parent, tmp_path / "all")
    size = (tmp_path / "all" / keep.CHANGES).stat().st_size
    monkeypatch.setattr(keep, "MOST_BYTES", size - 1)
    keep.keep_suite(folder.parent, tmp_path / "some")
    some, whole = (keep.read_kept_changes(tmp_path / name) for name in ("some", "all"))
    assert 0 < len(some) < len(whole)
    assert some.groupby(["cell", "task", "kind"]).size().max() in keep.ENTRIES
    assert (tmp_path / "some" / keep.CHANGES).stat().st_size < size
    for _, part in whole.groupby(["cell", "task", "kind"]):
        kept = some.merge(part[["cell", "task", "kind"]].head(1))["entry"].tolist()
        assert kept == part["entry"].tolist()[: len(kept)] != []


def test_cells_of_an_earlier_version_are_kept_with_what_they_have(cells, tmp_path):
    folder, records = cells
    old = records[1]
    old["files"] = {k: v for k, v in old["files"].items() if k.startswith("samples")}
    write_json(folder / old["id"] / "run.json", old)
    keep.keep_suite(folder.parent, tmp_path / "kept")
    _, items = keep.read_kept(tmp_path / "kept")
    assert items["cell"].drop_duplicates().tolist() == [r["id"] for r in records]
    own = items[items["cell"] == old["id"]]
    assert (own["score"].to_numpy() == cell_items(1)["score"].to_numpy()).all()
    assert own[["form", "base_score", "base_loss", "subject"]].isna().all(axis=None)
    assert items[items["cell"] == records[0]["id"]].notna().all(axis=None)


def test_what_an_earlier_version_kept_is_read(tmp_path):
    rows = pd.DataFrame({"id": ["a"], "record": [json.dumps(record())]})
    rows.to_parquet(tmp_path / keep.RECORDS)
    old = {"cell": "a", "task": "facts", "item": [0, 1], "score": np.float32([0.0, 1.0])}
    pd.DataFrame(old).to_parquet(tmp_path / keep.ITEMS)
    records, items = keep.read_kept(tmp_path)
    assert records == [record()]
    assert items["score"].tolist() == [0.0, 1.0]
    assert list(items.columns) == ["cell", "task", "item", "score"]
    assert keep.read_kept_changes(tmp_path).empty


@pytest.mark.parametrize("name", [ITEMS, CHANGES])
def test_a_damaged_file_is_not_kept(cells, tmp_path, name):
    folder, records = cells
    path = folder / records[0]["id"] / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DataError, match="not the file that the record describes"):
        keep.keep_suite(folder.parent, tmp_path / "kept")


# --- cells ---------------------------------------------------------------------------------------


class Quiet:
    def note(self, line): ...
    def step(self, step, total, loss): ...


def write_task(home: Checkout, name: str, rows: list[dict], output: str, **metadata) -> None:
    path = home.root / "data" / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = {
        "version": 1, "title": name, "source": {"reader": "jsonl", "test": str(path)},
        "metric": "exact_match", "unit": "points", "direction": "higher", **metadata,
    }  # fmt: skip
    config = {"task": name, "output_type": output, "doc_to_text": "prompt", "metadata": about}
    if output == "generate_until":
        config["doc_to_target"] = "response"
        config["generation_kwargs"] = {"until": [], "do_sample": False, "max_gen_toks": 2}
    else:
        config |= {"doc_to_text": "", "doc_to_target": "text"}
    (home.root / f"workflow/tasks/tiny/{name}.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Checkout:
    """Tasks of four kinds: choices with a column of subjects, text said and text that runs on."""
    from ballast.worlds.text import NAMES, VALUES

    made = Checkout(tmp_path_factory.mktemp("churn"))
    made.save_base()
    path = made.root / "data/tiny_keep.test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for place, row in enumerate(rows[1:]):  # the first has none
        row["topic"] = ["even", "odd"][place % 2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = made.root / "workflow/tasks/tiny/tiny_keep.yaml"
    config = yaml.safe_load(path.read_text())
    config["metadata"]["source"]["columns"] = {"subject": "topic"}
    path.write_text(yaml.safe_dump(config))
    said = [
        {"question": f"tell the {kind} of {who}", "response": VALUES[kind][0]}
        for who in NAMES[:5]
        for kind in ("city", "job")
    ]
    pattern = {"answer_pattern": "[a-z]+", "subject_pattern": "the (city|job)"}
    write_task(made, "tiny_say", said, "generate_until", **pattern)
    texts = [{"text": f"tell the city of {who}"} for who in NAMES[5:10]]
    write_task(made, "tiny_text", texts, "loglikelihood_rolling", metric="next_token_accuracy")
    return made


def planned(home: Checkout, file: str = "config", **changes):
    """The suite's plan, cells of `tune` after it, and its base ready."""
    from ballast.layout import Layout
    from ballast.plan import make_plan
    from ballast.ready import make_ready, spec_of_base
    from ballast.suite import load_suite
    from ballast.tasks import read_tasks
    from ballast.tune import make_tune_plan

    base = {"source": {"path": "BASE"}, "targets": ["tiny_learn"]}
    base["upstream"] = ["tiny_keep", "tiny_say", "tiny_text"]
    methods = {"full_st": {"learning_rate": 0.05}, "wise_ft": {}}
    changes = {"bases": {"tiny": base}, "methods": methods} | changes
    path = home.write_suite(file, **changes)
    layout = Layout(home.root, home.root / "results")
    suite = load_suite(yaml.safe_load(path.read_text()), layout, path.parent)
    plan = make_plan(suite).set_index("id", drop=False)
    ready = make_ready(
        **spec_of_base(plan, "tiny"), tasks=read_tasks(layout.tasks), layout=layout,
        report=lambda line: None,
    )  # fmt: skip
    write_json(layout.suite("tiny") / "bases/tiny.json", ready)
    return plan, make_tune_plan(suite, plan), layout, ready


def run(row, layout) -> tuple[dict, Path]:
    from ballast.cell import run_cell
    from ballast.outcome import cell_folder

    row = row.to_dict()
    made, folder = run_cell(row, layout, Quiet()), cell_folder(row, layout)
    validate_record(made)
    write_json(folder / "run.json", made)
    return made, folder


@pytest.fixture(scope="module")
def ran(home):
    """Plan, layout, ready base, and by method record and folder: a trained and a post-hoc cell."""
    plan, _, layout, ready = planned(home)
    found = {row["method"]: run(row, layout) for _, row in plan.iterrows()}
    return plan, layout, ready, found


def by_hand(own: pd.DataFrame, base: pd.DataFrame) -> dict[str, int]:
    counts = dict.fromkeys(COUNTS, 0)
    for after, before in zip(own.itertuples(), base.itertuples(), strict=True):
        assert after.item == before.item
        counts["n"] += 1
        was, now = before.score >= 0.5, after.score >= 0.5
        counts["kept" if was and now else "gained" if now else "forgotten" if was else "never"] += 1
        if was and not now:
            counts["forgotten_form"] += after.form != 0
            counts["forgotten_likely"] += math.exp(-after.loss) >= 0.5
    return counts


@pytest.mark.parametrize("method", ["full_st", "wise_ft"])
def test_a_cell_stores_its_items_beside_the_bases(ran, method):
    _, _, ready, found = ran
    made, folder = found[method]
    assert set(made["churn"]) == {"tiny_keep", "tiny_say", "tiny_learn"}  # no running text
    items = items_of(folder.parent, [made])
    assert set(items["task"]) == {*made["churn"], "tiny_text"} == set(made["scores"])
    for task, part in items.groupby("task", observed=True):
        own = pd.read_parquet(folder / f"samples/{task}.parquet")
        base = pd.read_parquet(ready["tasks"][task]["items"])
        for name in ("score", "loss", "form"):
            assert np.allclose(part[name], own[name])
            assert np.allclose(part[f"base_{name}"], base[name])
        assert 100 * base["score"].mean() == pytest.approx(made["base_scores"][task]["value"]) or (
            task == "tiny_text"
        )
        if task in made["churn"]:
            counts = {k: v for k, v in made["churn"][task].items() if k != "subjects"}
            assert counts == by_hand(own, base)
    assert method != "full_st" or any(c["gained"] + c["forgotten"] for c in made["churn"].values())


def test_subjects_come_from_a_column_or_from_the_question(ran):
    made, folder = ran[3]["full_st"]
    own = made["churn"]
    assert {k: v["n"] for k, v in own["tiny_keep"]["subjects"].items()} == {"even": 6, "odd": 5}
    assert {k: v["n"] for k, v in own["tiny_say"]["subjects"].items()} == {"city": 5, "job": 5}
    assert "subjects" not in own["tiny_learn"]
    items = items_of(folder.parent, [made], tasks=["tiny_keep"])
    assert items["subject"].tolist()[:4] == ["", "even", "odd", "even"]


def test_changed_answers_can_be_read(ran, home):
    from ballast.worlds.text import VALUES

    made, folder = ran[3]["full_st"]
    changes = read_json(folder / CHANGES)
    assert set(changes) == set(made["churn"])
    seen = 0
    for task, kinds in changes.items():
        own = pd.read_parquet(folder / f"samples/{task}.parquet").set_index("item")
        for kind, entries in kinds.items():
            assert len(entries) == min(10, made["churn"][task][kind])
            for entry in entries:
                right, wrong = entry["after"], entry["before"]
                if kind == "forgotten":
                    right, wrong = wrong, right
                assert right == entry["reference"] != wrong
                assert entry["question"].startswith("tell the ")
                if task == "tiny_learn":
                    assert entry["after"] == VALUES["food"][own.loc[entry["item"], "prediction"]]
                seen += 1
    assert seen


def test_scored_again_a_cell_has_the_same_bytes(ran):
    plan, layout, _, found = ran
    before, folder = found["full_st"]
    files = {name: (folder / name).read_bytes() for name in (ITEMS, CHANGES)}
    row = plan[plan["method"] == "full_st"].iloc[0]
    again, _ = run(row, layout)
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert again["churn"] == before["churn"]
    assert again["drift"] == pytest.approx(before["drift"], nan_ok=True)
    assert again["costs"]["seconds"]["train"] == before["costs"]["seconds"]["train"]


def test_drift_has_a_phase_of_its_own(ran):
    for made, folder in (ran[3][name] for name in ("full_st", "wise_ft")):
        assert made["drift"]["weight_change"] > 0
        assert made["drift"]["kl"] > 0
        seconds = made["costs"]["seconds"]
        assert seconds["drift"] > 0
        assert seconds["total"] == pytest.approx(
            sum(v for k, v in seconds.items() if k != "total"), abs=0.01
        )
        assert set(made["costs"]["memory_mb"]) == {"train", "evaluate"}
        assert not list(folder.glob("tmp*"))


def test_a_suite_may_leave_the_drift_out(ran, home):
    plan, layout, _, found = ran
    limits = {"upstream": 12, "downstream": 12, "validation": 6, "batch_size": 32, "drift": False}
    other, _, _, _ = planned(home, "other", evaluation=limits)
    assert (other["train_key"] == plan["train_key"]).all()
    assert (other["eval_key"] != plan["eval_key"]).all()
    made, _ = run(other[other["method"] == "full_st"].iloc[0], layout)
    assert made["drift"] == {}
    assert made["costs"]["seconds"]["drift"] == 0
    assert made["churn"] == found["full_st"][0]["churn"]


def test_cells_of_tune_have_no_churn(home):
    _, tune, layout, ready = planned(home)
    row = tune[tune["method"] == "full_st"].iloc[0]
    made, folder = run(row, layout)
    assert made["churn"] == {} == made["drift"]
    assert not (folder / ITEMS).exists()
    samples = {f"samples/{task}.parquet" for task in made["scores"]}
    assert set(made["files"]) == {"adapter.safetensors", "curve.csv", *samples}
    untouched = ready["tasks"]["tiny_learn"]["validation_scores"]
    assert untouched["n"] == made["scores"]["tiny_learn"]["n"] == 4
    assert "validation_scores" not in ready["tasks"]["tiny_keep"]


def test_validation_scores_are_of_the_untouched_base(home):
    from ballast.evaluation import score_task
    from ballast.harness import language_model
    from ballast.models import load_base
    from ballast.tasks import read_tasks

    _, _, layout, ready = planned(home)
    entry = ready["tasks"]["tiny_learn"]
    lm = language_model(load_base(Path(ready["model"])), 4)
    task = read_tasks(layout.tasks)["tiny_learn"]
    found = score_task(lm, task, Path(entry["folder"]), " ", "validation").summary
    assert entry["validation_scores"] == pytest.approx(found, rel=1e-5)


def test_a_failed_cell_has_no_churn(ran):
    from ballast.outcome import failed_record

    plan, layout, _, _ = ran
    made = failed_record(plan.iloc[0].to_dict(), layout, "diverged", "loss is NaN", 1)
    validate_record(made)
    assert made["churn"] == {}
    assert ITEMS not in made["files"]


def test_a_base_made_ready_by_an_earlier_version_is_named(home):
    plan, _, layout, ready = planned(home)
    for task in ready["tasks"].values():
        task.pop("items")
    write_json(layout.suite("tiny") / "bases/tiny.json", ready)
    with pytest.raises(DataError, match=r"items are missing.*remove the suite's bases"):
        run(plan[plan["method"] == "full_st"].iloc[0], layout)


def test_scores_of_an_earlier_version_are_made_again():
    """Items and churn came with version 2: cells of version 1 must not look up to date."""
    assert versions.EVALUATION >= 2
    assert versions.TRAIN == 1
