"""Data: generated worlds, a user's own files, and the real data sets."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from ballast import sources
from ballast.bases import micro_lm, micro_vlm
from ballast.data import MANIFEST, check_overlaps, identity, load_split, prepare_task
from ballast.errors import DataError
from ballast.evaluation import score_task
from ballast.files import write_json
from ballast.harness import language_model
from ballast.models import load_base
from ballast.tasks import Task, read_tasks
from ballast.worlds import text, vision

ROOT = Path(__file__).resolve().parents[1]
TASKS = read_tasks(ROOT / "workflow" / "tasks")
WORLDS = {"micro-lm": text, "micro-vlm": vision}
OF_WORLDS = [
    (world, task)
    for world, module in WORLDS.items()
    for task in module.UPSTREAM + module.DOWNSTREAM
]
each_task = pytest.mark.parametrize(("world", "task"), OF_WORLDS)
without_data = pytest.mark.skipif(
    not os.environ.get("BALLAST_DATA"), reason="BALLAST_DATA names no folder of real data"
)
COUNTS = {"train": 1000, "validation": 200, "test": 300}


def rows_of(world: str, task: str, split: str, count: int | None = None) -> list[dict]:
    source = {"reader": "world", "world": world, "task": task}
    return sources.rows(source, split, count or COUNTS[split])


# --- the generated worlds ------------------------------------------------------------------------


@each_task
def test_splits_are_disjoint_by_their_text(world, task):
    texts = {s: [identity(row) for row in rows_of(world, task, s)] for s in COUNTS}
    for split, found in texts.items():
        assert len(set(found)) == len(found) == COUNTS[split]
    assert not set(texts["train"]) & set(texts["validation"])
    assert not set(texts["train"]) & set(texts["test"])
    assert not set(texts["validation"]) & set(texts["test"])


@each_task
def test_rows_are_whole(world, task):
    words = set(WORLDS[world].vocabulary())
    for split in COUNTS:
        for row in rows_of(world, task, split, 50):
            asked = row["question"].replace("?", " ? ").split()
            assert set(asked) | set(row["response"].split()) <= words
            if "choices" in row:
                assert row["choices"][row["answer"]] == row["response"]
                assert len(set(row["choices"])) == len(row["choices"])
            if world == "micro-vlm":
                assert (row["image"].size, row["image"].mode) == ((32, 32), "RGB")


def overlaps(world: str, targets: list[str], plant: tuple[str, str] | None, tmp_path: Path):
    """check_overlaps over a world; `plant` puts a test item of the second into the first."""
    module, folders = WORLDS[world], {}
    for task in module.UPSTREAM + module.DOWNSTREAM:
        splits = ("train", "test") if task in targets else ("test",)
        found = {s: [identity(row) for row in rows_of(world, task, s)] for s in splits}
        if plant and task == plant[0]:
            found["train"][7] = identity(rows_of(world, plant[1], "test")[3])
        folders[task] = tmp_path / task
        write_json(folders[task] / "identities.json", found)
    check_overlaps(folders, targets)


@pytest.mark.parametrize("world", WORLDS)
def test_no_target_trains_on_an_upstream_item(world, tmp_path):
    overlaps(world, list(WORLDS[world].DOWNSTREAM), None, tmp_path)


@pytest.mark.parametrize(
    ("world", "plant"), [("micro-lm", ("cipher", "reverse")), ("micro-vlm", ("icons", "shape"))]
)
def test_a_planted_overlap_is_refused_and_named(world, plant, tmp_path):
    item = identity(rows_of(world, plant[1], "test")[3])
    with pytest.raises(DataError) as error:
        overlaps(world, [plant[0]], plant, tmp_path)
    message = str(error.value)
    assert message.startswith("1 training items of " + plant[0])
    assert f"test items of {plant[1]}" in message
    assert repr(item) in message


def test_training_on_the_task_that_is_kept_is_refused(tmp_path):
    """The same items under another task's name, as when a suite's target is also upstream."""
    items = [identity(row) for row in rows_of("micro-lm", "copy", "train", 20)]
    write_json(tmp_path / "a" / "identities.json", {"train": items, "test": ["x"]})
    write_json(tmp_path / "b" / "identities.json", {"test": items[5:8]})
    with pytest.raises(DataError, match="3 training items of a are test items of b"):
        check_overlaps({"a": tmp_path / "a", "b": tmp_path / "b"}, ["a"])


def test_sums_that_arithmetic_tests_are_not_tuned_on_in_another_dress():
    tested = {row["question"] for row in rows_of("micro-lm", "arithmetic", "test", 300)}
    tuned = {
        r["question"].removeprefix("dialect ") for r in rows_of("micro-lm", "dialect", "train")
    }
    assert all(question[0].isdigit() for question in tested | tuned)
    assert not tested & tuned


def test_scenes_that_are_tested_are_trained_on_by_no_task():
    scenes = {split: set() for split in COUNTS}
    for task in vision.UPSTREAM + vision.DOWNSTREAM:
        for split, found in scenes.items():
            found |= {row["scene"] for row in vision.rows(task, split, 200)}
    assert not scenes["train"] & (scenes["test"] | scenes["validation"])


def test_pretraining_sees_no_tested_question():
    seen = {row["question"] for row in islice(text.pretraining(0), 30_000)}
    for task in text.UPSTREAM + text.DOWNSTREAM:
        for split in ("validation", "test"):
            asked = {row["question"] for row in rows_of("micro-lm", task, split)}
            assert not asked & seen, task


def used(world: str) -> set[str]:
    """Every word that a world's downstream tasks use."""
    words: Counter[str] = Counter()
    for task in WORLDS[world].DOWNSTREAM:
        for split in COUNTS:
            for row in rows_of(world, task, split, 300 if split == "test" else 200):
                for line in (row["question"], row["response"], *row.get("choices", [])):
                    words.update(line.split())
    return set(words)


def test_every_downstream_word_is_known_from_pretraining():
    counted = {
        "micro-lm": text.token_counts(0, micro_lm.STEPS * micro_lm.BATCH),
        "micro-vlm": vision.token_counts(0, micro_vlm.STEPS, micro_vlm.BATCH),
    }
    for world, counts in counted.items():
        words = used(world)
        assert len(words) > 20
        rare = {word: counts[word] for word in words if counts[word] < 1000}
        assert not rare, world


def content(world: str, task: str, split: str) -> str:
    total = hashlib.sha256()
    for row in rows_of(world, task, split, 40):
        picture = row.pop("image", None)
        total.update(json.dumps(row, sort_keys=True).encode())
        total.update(picture.tobytes() if picture else b"")
    return total.hexdigest()


def contents() -> str:
    """Hash of some rows of every task and split, pictures included."""
    found = [content(world, task, split) for world, task in OF_WORLDS for split in COUNTS]
    assert len(set(found)) == len(found)
    return hashlib.sha256("".join(found).encode()).hexdigest()


def test_rows_are_the_same_on_every_call_and_in_every_process():
    """Another process with another hash seed: no set's order and no global state has a say."""
    code = "import test_data; print(test_data.contents())"
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert contents() == contents() == other.stdout.strip()


def test_seeds_of_pretraining_differ_and_repeat():
    lines = [[row["question"] for row in islice(text.pretraining(seed), 50)] for seed in (0, 0, 1)]
    assert lines[0] == lines[1] != lines[2]
    batches = [next(vision.pretraining(seed, 16)) for seed in (0, 0, 1)]
    assert batches[0].questions == batches[1].questions != batches[2].questions
    assert np.array_equal(batches[0].images, batches[1].images)
    assert not np.array_equal(batches[0].images, batches[2].images)


# --- a user's own data ---------------------------------------------------------------------------

GOOD = {"question": "2 + 2", "response": "4"}
CHOICE = {"question": "2 + 2", "choices": ["3", "4"], "answer": 1}


def read(lines: list[object] | str, tmp_path: Path, columns: dict | None = None) -> list[dict]:
    path = tmp_path / "mine.jsonl"
    if not isinstance(lines, str):
        lines = "\n".join(json.dumps(line) for line in lines)
    path.write_text(lines, encoding="utf-8")
    source = {"reader": "jsonl", "test": str(path)} | ({"columns": columns} if columns else {})
    return sources.rows(source, "test", None)


def test_lines_and_arrays_are_read_alike(tmp_path):
    expected = [GOOD, CHOICE | {"response": "4"}]
    assert read([GOOD, CHOICE], tmp_path) == expected
    assert read(json.dumps([GOOD, CHOICE], indent=1), tmp_path) == expected
    odd = {"question": "a\u2028b\x85c", "response": "4"}
    assert read(json.dumps(odd, ensure_ascii=False) + "\n\n", tmp_path) == [odd]
    assert read([{"text": "once"}], tmp_path) == [{"text": "once"}]


def test_columns_are_mapped(tmp_path):
    line = {"q": "2 + 2", "gold": "4", "other": 1}
    assert read([line], tmp_path, {"question": "q", "response": "gold"}) == [GOOD]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"question": 4, "response": "4"}, "question is 4; a text is expected"),
        ({"question": "x"}, "response is None; a text is expected"),
        ({"question": "x", "response": "  "}, "response is '  '"),
        ({"response": "x"}, "question is None"),
        ({"text": 5}, "text is 5; a text is expected"),
        ("question", "'question'; an object"),
        (["question", "response"], "an object"),
        (7, "7; an object"),
        (CHOICE | {"answer": 2}, "answer is 2; an index from 0 to 1"),
        (CHOICE | {"answer": -1}, "answer is -1; an index"),
        (CHOICE | {"answer": "4"}, "answer is '4'; an index"),
        (CHOICE | {"answer": True}, "answer is True; an index"),
        ({"question": "x", "choices": ["3", "4"]}, "answer is None; an index"),
        (CHOICE | {"choices": "34"}, "choices is '34'; a list"),
        (CHOICE | {"choices": ["3", 4]}, r"choices is \['3', 4\]; a list"),
        (CHOICE | {"choices": ["4"], "answer": 0}, "choices is"),
        (CHOICE | {"response": "3"}, "response is '3', the answer '4'"),
    ],
)
def test_a_bad_row_is_named(bad, message, tmp_path):
    with pytest.raises(DataError, match=f"mine.jsonl, line 3: .*{message}"):
        read([GOOD, GOOD, bad, GOOD], tmp_path)
    with pytest.raises(DataError, match=f"mine.jsonl, row 2: .*{message}"):
        read(json.dumps([GOOD, bad]), tmp_path)


def test_bad_json_is_named(tmp_path):
    with pytest.raises(DataError, match=r"mine.jsonl, line 3: not JSON"):
        read(json.dumps(GOOD) + "\n\n{'question': 1}\n", tmp_path)
    with pytest.raises(DataError, match=r"mine.jsonl: not JSON: .*line 1"):
        read('[{"question": "x"', tmp_path)
    (tmp_path / "latin").write_bytes('{"question": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="latin: not UTF-8 at byte 14"):
        sources.rows({"reader": "jsonl", "test": str(tmp_path / "latin")}, "test", None)


def test_an_empty_file_a_missing_split_and_an_unknown_reader_are_refused(tmp_path):
    with pytest.raises(DataError, match="no rows"):
        read("", tmp_path)
    with pytest.raises(DataError, match="no path for the split train"):
        sources.rows({"reader": "jsonl", "test": "x"}, "train", None)
    with pytest.raises(DataError, match=r"reader 'jsn'; allowed: .*jsonl"):
        sources.rows({"reader": "jsn"}, "test", None)
    with pytest.raises(DataError, match="split 'dev'; allowed: train, validation, test"):
        sources.rows({"reader": "jsonl", "test": "x"}, "dev", None)


def test_train_and_validation_share_no_row_of_the_training_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(GOOD | {"question": f"q{i}"}) for i in range(200)))
    source = {"reader": "jsonl", "train": str(path)}
    train, held = (sources.rows(source, split, None) for split in ("train", "validation"))
    assert (len(train), len(held)) == (180, 20)
    assert not {r["question"] for r in train} & {r["question"] for r in held}
    assert sources.rows(source, "train", 50) == train[:50]


@pytest.fixture
def small_base(tmp_path):
    """A text base whose weights do not matter."""
    tokenizer = micro_lm.build_tokenizer()
    micro_lm.build_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return load_base(tmp_path / "base")


def own_task(source: dict, kind: str = "generate_until", **config) -> Task:
    config |= {"task": "own", "output_type": kind, "metadata": {"source": source}}
    return Task("own", ROOT, config, "")


def make(base, task, folder, sizes):
    entry = {"sizes": sizes, "max_length": 64}
    spec = {"template": "chat", "delimiter": " "}
    return prepare_task(lambda: base, spec, task, entry, folder, lambda line: None)


def test_tested_rows_of_own_data_are_taken_out_of_training_and_counted(small_base, tmp_path):
    rows = [{"question": f"copy {name}", "response": name} for name in text.NAMES]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("\n".join(map(json.dumps, rows)))
    test.write_text("\n".join(map(json.dumps, rows[:10])))
    source = {"reader": "jsonl", "train": str(train), "test": str(test)}
    sizes = {"train": None, "validation": None, "test": None}
    manifest = make(small_base, own_task(source), tmp_path / "own", sizes)
    splits = manifest["splits"]
    assert splits["test"]["rows"] == 10
    assert splits["train"]["overlapping"] + splits["validation"]["overlapping"] == 10
    assert splits["train"]["rows"] + splits["validation"]["rows"] == len(rows) - 10
    ids = [set(small_base.tokenizer.encode(row["question"])[1:]).pop() for row in rows[:10]]
    trained, _ = load_split(tmp_path / "own", "train")
    assert not {token for example in trained["input_ids"] for token in example} & set(ids)


def test_generated_splits_that_overlap_are_an_error(small_base, tmp_path, monkeypatch):
    rows = [{"question": f"copy {name}", "response": name} for name in text.NAMES]
    monkeypatch.setattr(
        sources, "rows", lambda source, split, count: rows[:5] if split == "test" else rows[4:]
    )
    task = own_task({"reader": "world", "world": "micro-lm", "task": "copy"})
    with pytest.raises(DataError, match=f"own: 1 rows of train .*copy {text.NAMES[4]}"):
        make(small_base, task, tmp_path / "own", {"train": 9, "test": 5})
    assert not (tmp_path / "own" / MANIFEST).exists()


@pytest.mark.parametrize(
    ("row", "kind", "missing"),
    [
        (GOOD, "multiple_choice", "no choices"),
        (GOOD, "loglikelihood_rolling", "no text"),
        ({"text": "once"}, "generate_until", "no question"),
    ],
)
def test_rows_that_the_task_cannot_score_are_named(row, kind, missing, small_base, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(row))
    task = own_task({"reader": "jsonl", "test": str(path)}, kind)
    with pytest.raises(DataError, match=f"own test, row 1: {missing}"):
        make(small_base, task, tmp_path / "own", {"test": None})


def test_a_picture_task_on_a_text_base_is_refused(small_base, tmp_path):
    with pytest.raises(DataError, match="vlm_color shows images, but the base is a text model"):
        make(small_base, TASKS["vlm_color"], tmp_path / "color", {"test": 3})


def test_prepared_data_are_made_once(small_base, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"question": "copy ada", "response": "ada"}))
    task = own_task({"reader": "jsonl", "test": str(path)})
    first = make(small_base, task, tmp_path / "own", {"test": None})
    path.unlink()

    def refuse():
        raise AssertionError("the base was loaded again")

    entry = {"sizes": {"test": None}, "max_length": 64}
    assert prepare_task(refuse, {}, task, entry, tmp_path / "own", print) == first


# --- real data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scan", "tinystories", "wikitext2", "easy_vqa"])
def test_without_ballast_data_the_error_says_what_to_set(name, monkeypatch, tmp_path):
    monkeypatch.delenv("BALLAST_DATA", raising=False)
    with pytest.raises(DataError, match="set the environment variable BALLAST_DATA to the folder"):
        sources.rows(TASKS[name].source, "test", 3)
    monkeypatch.setenv("BALLAST_DATA", str(tmp_path))
    with pytest.raises(DataError, match="no such file or folder; is BALLAST_DATA right"):
        sources.rows(TASKS[name].source, "test", 3)


@pytest.mark.data
@without_data
def test_scan_subset_is_stratified_and_fixed():
    source = TASKS["scan"].source
    whole, subset = sources.rows(source, "test", None), sources.rows(source, "test", 500)
    assert (len(whole), len(subset)) == (4182, 500)
    assert subset == sources.rows(source, "test", 500)

    def shares(rows):
        return Counter(len(row["response"].split()) for row in rows)

    all_lengths, lengths = shares(whole), shares(subset)
    for length, count in all_lengths.items():
        assert abs(lengths[length] - count * 500 / 4182) <= 1
    assert len({row["question"] for row in subset}) == 500
    names = [row["question"] for row in subset]
    assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] == "414d618ef968d682"


@pytest.mark.data
@without_data
def test_scan_splits_are_disjoint():
    source = TASKS["scan"].source
    texts = {s: {r["question"] for r in sources.rows(source, s, None)} for s in COUNTS}
    assert len(texts["train"]) + len(texts["validation"]) == 16_728
    assert not texts["train"] & texts["validation"]
    assert not texts["test"] & (texts["train"] | texts["validation"])


@pytest.mark.data
@without_data
def test_scan_actions_are_words_that_the_stories_base_knows():
    """As raw bytes of the file say, one for one; no action needs a byte-fallback token."""
    source = TASKS["scan"].source
    folder = Path(os.environ["BALLAST_DATA"])
    first = (folder / source["test"]).read_text().splitlines()[0]
    row = sources.rows(source, "test", None)[0]
    command, _, actions = first.removeprefix("IN: ").partition(" OUT: ")
    assert row["question"] == command
    back = {word: action for action, word in sources.ACTION_WORDS.items()}
    assert len(back) == 6
    assert [back[word] for word in row["response"].split()] == actions.split()
    tokenizer = AutoTokenizer.from_pretrained(folder / "stories260K" / "hf")
    ids = tokenizer.encode(" ".join(back), add_special_tokens=False)
    assert not any(t.startswith("<0x") for t in tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.data
@without_data
def test_the_untouched_stories_base_scores_its_loss(tmp_path):
    """Per story with BOS: 1.304 nat/token measured in another way (the data's README)."""
    base = load_base(Path(os.environ["BALLAST_DATA"]) / "stories260K" / "hf")
    entry = {"sizes": {"test": 300}, "max_length": None}
    spec = {"template": "IN: {question} OUT:", "delimiter": " "}
    task = TASKS["tinystories"]
    prepare_task(lambda: base, spec, task, entry, tmp_path / "t", lambda line: None)
    scores = score_task(language_model(base, 16), task, tmp_path / "t", " ")
    assert scores.summary["n"] == 300
    assert scores.summary["loss"] == pytest.approx(1.30, abs=0.02)
    assert 50 < scores.summary["value"] < 75


@pytest.mark.data
@without_data
def test_stories_are_whole_and_wikitext_has_no_headings():
    stories = sources.rows(TASKS["tinystories"].source, "test", None)
    assert len(stories) >= 300
    assert all(row["text"].startswith(("Once upon", "One day")) for row in stories)
    assert max(len(row["text"]) for row in stories) <= TASKS["tinystories"].source["longest"]
    pages = sources.rows(TASKS["wikitext2"].source, "test", 50)
    assert all(len(row["text"]) >= 150 and not row["text"].startswith("=") for row in pages)


@pytest.mark.data
@without_data
def test_easy_vqa_pictures_load_and_stand_on_one_side_only():
    source = TASKS["easy_vqa"].source
    found = {split: sources.rows(source, split, 400) for split in COUNTS}
    for rows in found.values():
        for row in rows:
            assert (row["image"].size, row["image"].mode) == ((64, 64), "RGB")
            assert row["choices"][row["answer"]] == row["response"]
            assert len(row["choices"]) == 13
    pictures = {split: {row["image"].tobytes() for row in rows} for split, rows in found.items()}
    assert not pictures["train"] & pictures["validation"]
    assert not pictures["test"] & (pictures["train"] | pictures["validation"])
    names = {split: {row["identity"] for row in rows} for split, rows in found.items()}
    assert not names["train"] & names["validation"]
    again = sources.rows(source, "validation", 400)
    assert [r["question"] for r in again] == [r["question"] for r in found["validation"]]
    known = set(vision.vocabulary())
    words = Counter(w for rows in found.values() for r in rows for w in r["question"].split())
    assert sum(words[w] for w in words if w in known) > 0.97 * sum(words.values())


def test_the_example_of_pictures_of_ones_own_works(tmp_path, monkeypatch):
    """The task file of CONTRIBUTING, its folder made as is said there."""
    import re

    import yaml
    from PIL import Image

    from checkout import REPOSITORY

    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(task: my_pictures\n.*?)```", text, re.S)
    (config,) = [yaml.safe_load(block) for block in blocks]
    for split, count in (("train", 20), ("test", 5)):
        (folder / split).mkdir(parents=True)
        lines = []
        for i in range(count):
            Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(folder / split / f"{i}.png")
            row = {"file_name": f"{i}.png", "question": f"{split} {i}?", "response": str(10 * i)}
            lines.append(json.dumps(row))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    source = config["metadata"]["source"] | {"dataset": str(folder)}
    found = {split: sources.rows(source, split, None) for split in sources.SPLITS}
    assert {split: len(rows) for split, rows in found.items()} == {
        "train": 18, "validation": 2, "test": 5,
    }  # fmt: skip
    assert [row["image"].getpixel((0, 0))[0] for row in found["test"]] == [0, 10, 20, 30, 40]
    assert found["test"][1]["question"] == "test 1?"
    assert found["test"][1]["response"] == "10"
