"""Readers: from a task's `source` to rows, whatever their origin.

A row has `question` and `response`; multiple-choice rows add `choices` and `answer` (an index);
image rows add `image` (PIL, RGB); plain-text rows have `text` alone. `identity`, where present, is
the text that tells two rows apart when question and response do not (the scene of an image).
Rows for encoders may have a second sentence, `pair`. Those of a classification have `answer` (an
index of the task's classes) or, as `response`, the class's name; those with gaps have `<mask>` in
their sentences for each word of the response, or `text` alone, of which a part is masked.
`subject`, where present, is the field that an item belongs to: results are counted by it too.
"""

from __future__ import annotations

import io
import json
import random
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ballast.errors import DataError
from ballast.escape import one_line, shorten
from ballast.faults import fault_of
from ballast.files import key_of, key_of_files
from ballast.layout import real_data

Row = dict[str, Any]
SPLITS = ("train", "validation", "test")
KEYS = (
    "question", "pair", "response", "choices", "answer", "text", "image", "identity", "subject",
)  # fmt: skip


def rows(source: dict[str, Any], split: str, count: int | None) -> list[Row]:
    """At most `count` rows of a split, the same ones every time.

    Raises DataError if the data cannot be found, or are not what their reader reads, in one line
    that says where, and if the reader is unknown.
    """
    if split not in SPLITS:
        raise DataError(f"split {split!r}; allowed: {', '.join(SPLITS)}")
    reader = _reader(source)
    try:
        found = reader(source, split, count)
    except DataError:
        raise
    except Exception as error:
        if fault_of(error) is not None or isinstance(error, MemoryError):
            raise
        where = " ".join(
            str(source[k]) for k in ("path", "train", "test", "dataset") if k in source
        )
        raise DataError(
            f"{where or source['reader']}: the reader {source['reader']} cannot read it: "
            f"{type(error).__name__}: {shorten(one_line(str(error)), 300)}"
        ) from error
    if not found:
        raise DataError(f"{source}: no rows in split {split}")
    return found


def world_key(world: str, base: bool = False) -> str:
    """Key of the code that makes a world's rows, and with `base` of what pretrains on them."""
    package = Path(__file__).parent
    names = {
        "micro-lm": ("worlds/text.py", "bases/micro_lm.py"),
        "micro-vlm": ("worlds/vision.py", "worlds/sprites.py", "bases/micro_vlm.py"),
        "micro-encoder": ("worlds/encoder.py", "worlds/text.py", "bases/micro_encoder.py"),
    }[world]
    return key_of_files(*[package / n for n in names if base or not n.startswith("bases/")])


def digest(source: dict[str, Any]) -> str:
    """Key of all that the rows of a source depend on: files read, or the code that makes them."""
    if source["reader"] == "world":
        return key_of(source, world_key(source["world"]))
    if source["reader"] == "hub":
        return key_of(source)
    return key_of(source, key_of_files(*[real_data(path) for path in _paths(source)]))


def _paths(source: dict[str, Any]) -> list[str]:
    return [source[key] for key in ("path", "train", "test", "images") if key in source]


def _reader(source: dict[str, Any]) -> Callable[[dict[str, Any], str, int | None], list[Row]]:
    readers = {
        "world": _world,
        "scan": _scan,
        "stories": _stories,
        "wikitext": _wikitext,
        "easy_vqa": _easy_vqa,
        "jsonl": _jsonl,
        "hub": _hub,
    }
    name = source.get("reader")
    if name not in readers:
        raise DataError(f"reader {name!r}; allowed: {', '.join(sorted(readers))}")
    return readers[name]


def _world(source: dict[str, Any], split: str, count: int | None) -> list[Row]:
    from ballast.worlds import encoder, text, vision

    worlds = {"micro-lm": text, "micro-vlm": vision, "micro-encoder": encoder}
    world = worlds[source["world"]]
    made = world.rows(source["task"], split, count)
    for row in made:
        if "scene" in row:
            row["identity"] = row.pop("scene")
    return made


def _split_tail(items: list[Any], split: str, seed: int, share: float = 0.1) -> list[Any]:
    """Train or validation part of a training file, by a seeded shuffle."""
    order = list(range(len(items)))
    random.Random(f"split-{seed}").shuffle(order)
    cut = int(len(items) * share)
    return [items[i] for i in (order[:cut] if split == "validation" else order[cut:])]


ACTION_WORDS = {
    "I_WALK": "walk",
    "I_RUN": "run",
    "I_JUMP": "jump",
    "I_LOOK": "look",
    "I_TURN_LEFT": "left",
    "I_TURN_RIGHT": "right",
}


def _scan(source: dict[str, Any], split: str, count: int | None) -> list[Row]:
    """SCAN: commands to action sequences; test items stratified by the length of the actions.

    With `actions: words` they are written as words, one for one: where embeddings and head are
    frozen, a model can only answer in tokens that it knows, and to one of stories the `_` of
    I_TURN_LEFT is a byte that it never saw.
    """
    path = real_data(source["test" if split == "test" else "train"])
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        command, _, actions = line.removeprefix("IN: ").partition(" OUT: ")
        if source.get("actions") == "words":
            actions = " ".join(ACTION_WORDS[action] for action in actions.split())
        found.append({"question": command, "response": actions})
    if split == "test":
        return _stratified(found, count, lambda row: len(row["response"].split()))
    return _split_tail(found, split, seed=0)[:count]


def _stratified(items: list[Row], count: int | None, stratum: Callable[[Row], int]) -> list[Row]:
    """`count` items that keep each stratum's share, drawn with a fixed seed."""
    if count is None or count >= len(items):
        return items
    groups: dict[int, list[Row]] = defaultdict(list)
    for item in items:
        groups[stratum(item)].append(item)
    drawn, owed = [], 0.0
    for key in sorted(groups):
        members = groups[key]
        random.Random(f"stratum-{key}").shuffle(members)
        owed += count * len(members) / len(items)
        take = min(len(members), round(owed - len(drawn)))
        drawn += members[:take]
    return drawn[:count]


def _stories(source: dict[str, Any], split: str, count: int | None) -> list[Row]:
    """TinyStories' plain text: whole stories, which begin with "Once upon" or "One day".

    A story that begins otherwise cannot be told from a paragraph and hangs on the one before; each
    piece is cut to its first `longest` characters, about one context of the model.
    """
    text = real_data(source["path"]).read_text(encoding="utf-8")
    # The file is a piece of a longer one: its first and last stories may be cut off.
    parts = re.split(r"\n\s*\n(?=Once upon|One day)", text)[1:-1]
    stories = [part.strip()[: source["longest"]] for part in parts if part.strip()]
    return [{"text": story} for story in stories[:count]]


def _wikitext(source: dict[str, Any], split: str, count: int | None) -> list[Row]:
    """WikiText: paragraphs of at least 200 characters, headings left out."""
    lines = real_data(source["path"]).read_text(encoding="utf-8").splitlines()
    texts = [line.strip() for line in lines if len(line) >= 200 and not line.startswith(" =")]
    random.Random("wikitext").shuffle(texts)
    return [{"text": text} for text in texts[:count]]


def _easy_vqa(source: dict[str, Any], split: str, count: int | None) -> list[Row]:
    """easy-VQA: a question about a picture of one shape; 13 answers, scored as multiple choice."""
    from PIL import Image

    name = "test" if split == "test" else "train"
    items = json.loads(real_data(source[name]).read_text(encoding="utf-8"))
    if split != "test":
        # Validation holds whole images out, so that no picture stands on both sides.
        images = sorted({item[2] for item in items})
        kept = set(_split_tail(images, split, seed=0))
        items = [item for item in items if item[2] in kept]
    random.Random(f"easy_vqa-{split}").shuffle(items)
    choices = sorted({item[1] for item in json.loads(real_data(source["train"]).read_text())})
    found, pictures = [], {}
    with zipfile.ZipFile(real_data(source["images"])) as archive:
        for question, answer, image in items[:count]:
            if image not in pictures:
                where = f"{source['images']}: {name}/images/{image}.png"
                try:
                    raw = archive.read(f"{name}/images/{image}.png")
                    pictures[image] = Image.open(io.BytesIO(raw)).convert("RGB")
                except (KeyError, zipfile.BadZipFile, zlib.error, OSError, ValueError) as error:
                    text = shorten(one_line(str(error)), 200)
                    raise DataError(f"{where}: no picture: {text}") from None
            found.append(
                {
                    "question": " ".join(re.findall(r"[a-z]+|\?", question.lower())),
                    "response": answer,
                    "choices": choices,
                    "answer": choices.index(answer),
                    "image": pictures[image],
                    "identity": f"{name} {image}",
                }
            )
    return found


def _jsonl(source: dict[str, Any], split: str, count: int | None) -> list[Row]:
    """A user's own data: one JSON object a line, or one array, with the row's keys (see README)."""
    key = "test" if split == "test" else "train"
    if key not in source:
        raise DataError(f"{source}: no path for the split {split}")
    path = real_data(source[key])
    found = [_mapped(item, source, where) for where, item in _objects(path)]
    return found[:count] if split == "test" else _split_tail(found, split, seed=0)[:count]


def _objects(path: Path) -> list[tuple[str, Any]]:
    """The values of a JSON array, or one a line, each with the words for where it stands."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: not UTF-8 at byte {error.start}") from None
    if text.lstrip().startswith("["):
        items = _parsed(text, path.name)
        return [(f"{path.name}, row {number}", item) for number, item in enumerate(items, 1)]
    # Not splitlines(): JSON texts may hold other line separators as they are.
    lines = [(f"{path.name}, line {i}", line) for i, line in enumerate(text.split("\n"), 1)]
    return [(where, _parsed(line, where)) for where, line in lines if line.strip()]


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from None


def _hub(source: dict[str, Any], split: str, count: int | None) -> list[Row]:
    """A data set of the hub, at a revision, with its columns mapped to a row's keys."""
    import datasets

    name = source.get("splits", {}).get(split, split)
    # Data alone: `datasets` runs no script of a repository any more, whatever it is asked.
    loaded = datasets.load_dataset(
        source["dataset"], source.get("config"), split=name, revision=source.get("revision")
    )
    loaded = loaded.select(range(min(count or len(loaded), len(loaded))))
    found = []
    for i in range(len(loaded)):
        where = f"{source['dataset']} {name}, row {i + 1}"
        try:
            item = loaded[i]
        except (OSError, ValueError, SyntaxError) as error:  # PIL's, for a broken picture
            if fault_of(error) is not None:
                raise
            raise DataError(
                f"{where}: cannot be decoded: {shorten(one_line(str(error)), 200)}"
            ) from None
        found.append(_mapped(item, source, where))
    return found


def _mapped(item: dict[str, Any], source: dict[str, Any], where: str) -> Row:
    """A row from an item by the source's `columns`; refuses missing keys and wrong types."""
    if not isinstance(item, dict):
        raise DataError(f"{where}: {_shown(item)}; an object with the row's keys is expected")
    columns = source.get("columns", {})
    row = {key: item[columns.get(key, key)] for key in KEYS if columns.get(key, key) in item}
    if "choices" in row:
        right = _right_choice(row, where)
        if row.setdefault("response", right) != right:
            raise DataError(
                f"{where}: response is {_shown(row['response'])}, the answer {_shown(right)}"
            )
    needed = ("text",) if "text" in row else ("question", "response")
    if "answer" in row and "response" not in row:
        needed = ("question",)  # a class by its index
    named = {key: f"{key} (column {name})" for key, name in columns.items() if name != key}
    for key in needed + (("pair",) if "pair" in row else ()):
        if not isinstance(row.get(key), str) or not row[key].strip():
            text = _shown(row.get(key))
            raise DataError(f"{where}: {named.get(key, key)} is {text}; a text is expected")
    for key, value in row.items():
        if not all(_is_unicode(text) for text in (value if isinstance(value, list) else [value])):
            raise DataError(
                f"{where}: {named.get(key, key)} is {_shown(value)}; text with half of a surrogate "
                "pair is no Unicode"
            )
    if "image" in row and not hasattr(row["image"], "convert"):
        name = named.get("image", "image")
        raise DataError(f"{where}: {name} is {_shown(row['image'])}; a picture is expected")
    return row


def _shown(value: Any) -> str:
    """A value as a message shows it: in one line, and not long."""
    return shorten(repr(value), 120)


def _is_unicode(value: Any) -> bool:
    if not isinstance(value, str):
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _right_choice(row: Row, where: str) -> str:
    choices, answer = row["choices"], row.get("answer")
    texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    if not texts or len(choices) < 2:
        raise DataError(
            f"{where}: choices is {_shown(choices)}; a list of two texts or more is expected"
        )
    if type(answer) is not int or not 0 <= answer < len(choices):
        last = len(choices) - 1
        raise DataError(
            f"{where}: answer is {_shown(answer)}; an index from 0 to {last} is expected"
        )
    return choices[answer]
