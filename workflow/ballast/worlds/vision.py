"""The vision world: pictures and questions that micro-vlm is pretrained on and tuned for.

A scene is a pale background and four places (top-left to bottom-right), each empty or holding a
coloured shape or digit. Scenes, not questions, are dealt to train, validation and test by a hash of
their content, so no test picture's scene is ever trained on by anything.

Upstream skills: colour, shape and digit at a place, the number of objects, the place of a lone
object. Downstream targets: `icons` (near: the same look at a place, but colour and shape together
make a new category, whose name is a word that the base has only ever repeated) and `inventory`
(far: captions in another order and grammar, with such words for colours).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from zlib import crc32

import numpy as np
from PIL import Image

from ballast.worlds.sprites import CELLS, COLORS, DIGITS, KINDS, SHAPES, TINTS, draw_free, draw_grid

UPSTREAM: tuple[str, ...] = ("color", "shape", "count", "position", "digit")
DOWNSTREAM: tuple[str, ...] = ("icons", "inventory")
SPLITS: tuple[str, ...] = ("train", "validation", "test")

WORLD_SEED = 20241
COLOR_NAMES, TINT_NAMES = tuple(COLORS), tuple(TINTS)
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
NUMBERS = ("one", "two", "three", "four")
NAMES = ("fox", "owl", "cat", "dog", "bee", "ant", "cow", "hen")
NAMES += ("pig", "rat", "elk", "emu", "ram", "yak", "ape", "cod")
REPEATED = (*NAMES, "and", ":")  # known from the skill `repeat` only
EMPTY = "nothing"

PHRASINGS: dict[str, tuple[str, ...]] = {
    "color": ("what color is the {noun} at {place} ?", "color of {place} ?"),
    "shape": ("what shape is the {noun} at {place} ?", "shape of {place} ?"),
    "digit": ("what digit is at {place} ?", "digit of {place} ?"),
    "count": ("how many {noun}s are in the image ?", "count the {noun}s"),
    "position": ("where is the {noun} ?", "place of the {noun} ?"),
    "caption": ("describe the image", "describe the {noun}s in the image"),
    "repeat": ("repeat the names {names}", "name {names}"),
    "icons": ("what icon is the object at {place} ?", "icon of {place} ?"),
    "inventory": ("name and count the {noun}s in the image",),
}
# The words of easy-VQA's questions, so that real pictures can be asked about.
ABOUT_ONE: tuple[tuple[str, str], ...] = (
    ("what color is the shape ?", "{color}"),
    ("what shape is in the image ?", "{shape}"),
    ("what is the {color} shape ?", "{shape}"),
    ("what color is the {shape} ?", "{color}"),
    ("what shape is present ?", "{shape}"),
    ("what shape does the image contain ?", "{shape}"),
    ("is there a {guess} in the image ?", "{truth}"),
    ("is a {guess} present ?", "{truth}"),
    ("does the image contain a {guess} ?", "{truth}"),
    ("is the shape not a {guess} ?", "{lie}"),
    ("is there not a {guess} ?", "{lie}"),
)
MIXTURE = {
    "color": 0.14,
    "shape": 0.14,
    "digit": 0.14,
    "count": 0.12,
    "position": 0.10,
    "caption": 0.14,
    "repeat": 0.08,
    "one": 0.14,
}
ROWS = {"train": 4000, "validation": 300, "test": 500}
SMALL = {"position": {"train": 2000, "validation": 300, "test": 500}}  # its scenes are few
_SLOTS = 1 + len(KINDS) * len(COLORS)  # what a place can hold


def _shuffled(items: tuple, *tag: object) -> list:
    """A fixed shuffle of the world: the same for every caller, different for every tag."""
    deck = list(items)
    random.Random(f"{WORLD_SEED} {tag}").shuffle(deck)
    return deck


def _icons() -> dict[tuple[str, str], str]:
    """Every shape has two names of its own, each for half of the colours, other halves per shape.

    Two by two, because a table of 64 unrelated names is not learned in the steps of a small run.
    """
    names = _shuffled(NAMES, "icons")
    return {
        (color, shape): names[2 * row + column % 2]
        for row, shape in enumerate(SHAPES)
        for column, color in enumerate(_shuffled(COLOR_NAMES, "halves", shape))
    }


ICONS: dict[tuple[str, str], str] = _icons()
INKS: dict[str, str] = dict(zip(COLOR_NAMES, _shuffled(NAMES, "inks"), strict=False))


@dataclass(frozen=True)
class Scenes:
    """B scenes: kinds (B, 4) index KINDS or are -1, colors (B, 4) COLORS, tints (B,) TINTS."""

    kinds: np.ndarray
    colors: np.ndarray
    tints: np.ndarray

    def __getitem__(self, which: np.ndarray | slice) -> Scenes:
        return Scenes(self.kinds[which], self.colors[which], self.tints[which])

    def codes(self) -> np.ndarray:
        """One number (B,) per scene, equal only for equal scenes."""
        slots = np.where(self.kinds < 0, 0, 1 + self.kinds * len(COLORS) + self.colors)
        return slots @ (_SLOTS ** np.arange(CELLS)) + self.tints * _SLOTS**CELLS

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Pictures (B, 32, 32, 3) uint8."""
        return draw_grid(self.kinds, self.colors, self.tints, rng)


def _buckets(codes: np.ndarray) -> np.ndarray:
    """The split of each scene as an index into SPLITS: 65 % train, 12 % validation, 23 % test."""
    mixed = codes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return np.digitize((mixed >> np.uint64(40)) % np.uint64(100), (65, 77))


def _scenes(task: str, split: str, count: int, rng: np.random.Generator) -> Scenes:
    """Draw `count` scenes of a split that suit the task: lone objects for `position`, and so on."""
    tries = count * {"train": 2, "validation": 12, "test": 6}[split] + 40
    digits = {"digit": 0.8, "color": 0.3, "count": 0.3, "caption": 0.4, "position": 0.4}
    digital = rng.random((tries, CELLS)) < digits.get(task, 0.0)
    kinds = np.where(
        digital,
        len(SHAPES) + rng.integers(len(DIGITS), size=(tries, CELLS)),
        rng.integers(len(SHAPES), size=(tries, CELLS)),
    )
    filled = np.ones(tries, int) if task == "position" else rng.integers(1, 5, size=tries)
    order = rng.random((tries, CELLS)).argsort(1)
    kinds = np.where(order < filled[:, None], kinds, -1)
    colors = rng.integers(len(COLORS), size=(tries, CELLS))
    scenes = Scenes(kinds, colors, rng.integers(len(TINTS), size=tries))
    keep = _buckets(scenes.codes()) == SPLITS.index(split)
    if task == "digit":
        keep &= (kinds >= len(SHAPES)).any(1)
    return scenes[np.flatnonzero(keep)[:count]]


def _thing(kind: int, color: int) -> str:
    return EMPTY if kind < 0 else f"{COLOR_NAMES[color]} {KINDS[kind]}"


def _describe(kinds: np.ndarray, colors: np.ndarray, tint: int) -> str:
    """The scene in words: background, then each place in reading order."""
    things = [_thing(kind, color) for kind, color in zip(kinds, colors, strict=True)]
    return f"{TINT_NAMES[tint]} : " + " , ".join(things)


def _ask(task: str, rng: random.Random, **words: str) -> str:
    noun = rng.choice(("object", "icon"))
    return rng.choice(PHRASINGS[task]).format(noun=noun, **words)


def _inventory(kinds: np.ndarray, colors: np.ndarray) -> str:
    """The new caption: last place first, shape before the colour's name, no gaps, a count."""
    things = [
        f"{KINDS[kind]} {INKS[COLOR_NAMES[color]]}"
        for kind, color in zip(kinds[::-1], colors[::-1], strict=True)
        if kind >= 0
    ]
    return " and ".join(things) + f" : {len(things)}"


def _turn(task: str, kinds: np.ndarray, colors: np.ndarray, rng: random.Random) -> tuple:
    """Question, response and choices (None if open) of one task about one scene."""
    if task == "caption":
        things = [_thing(k, c) for k, c in zip(kinds, colors, strict=True)]
        return _ask(task, rng), " , ".join(things), None
    if task == "inventory":
        return _ask(task, rng), _inventory(kinds, colors), None
    if task == "repeat":
        names = " ".join(rng.choices(REPEATED, k=4))
        return _ask(task, rng, names=names), names, None
    filled = [i for i in range(CELLS) if kinds[i] >= (len(SHAPES) if task == "digit" else 0)]
    if task == "count":
        return _ask(task, rng), NUMBERS[len(filled) - 1], NUMBERS
    place = rng.choice(filled)
    if task == "position":
        return _ask(task, rng), PLACES[place], PLACES
    color, kind = COLOR_NAMES[colors[place]], KINDS[kinds[place]]
    response, choices = {
        "color": (color, COLOR_NAMES),
        "shape": (kind, SHAPES),
        "digit": (kind, DIGITS),
        "icons": (ICONS.get((color, kind)), NAMES),
    }[task]
    return _ask(task, rng, place=PLACES[place]), response, choices


def rows(task: str, split: str, count: int | None, seed: int = 0) -> list[dict]:
    """`count` rows about distinct scenes (a few thousand for training if None).

    A row has image, question, response and scene; a multiple choice also choices and answer.
    Raises ValueError if the split has fewer scenes than were asked for.
    """
    tag = crc32(f"{WORLD_SEED} {task} {split} {seed}".encode())
    pixels, words = np.random.default_rng(tag), random.Random(tag)
    count = count or SMALL.get(task, ROWS)[split]
    scenes = _scenes(task, split, count * 8, pixels)
    _, first = np.unique(scenes.codes(), return_index=True)
    if len(first) < count:
        raise ValueError(f"{task}/{split} has {len(first)} distinct scenes, {count} asked for")
    scenes = scenes[np.sort(first)[:count]]
    found = []
    for index, picture in enumerate(scenes.draw(pixels)):
        kinds, colors = scenes.kinds[index], scenes.colors[index]
        question, response, choices = _turn(task, kinds, colors, words)
        row = {
            "image": Image.fromarray(picture),
            "question": question,
            "response": response,
            "scene": _describe(kinds, colors, scenes.tints[index]),
        }
        if choices:
            row |= {"choices": list(choices), "answer": choices.index(response)}
        found.append(row)
    return found


@dataclass(frozen=True)
class Batch:
    """Pretraining items: images (B, 32, 32, 3) uint8 or None, and the words of their turns."""

    images: np.ndarray | None
    questions: list[str]
    responses: list[str]


def _about_one(kind: int, color: int, rng: random.Random) -> tuple[str, str]:
    """A question in easy-VQA's words about a picture with one shape."""
    shape, color = KINDS[kind], COLOR_NAMES[color]
    asked = rng.choice((shape, color))
    truth = rng.random() < 0.5
    if not truth:
        family = SHAPES if asked == shape else COLOR_NAMES
        asked = rng.choice([other for other in family if other != asked])
    guess = asked if asked in SHAPES else f"{asked} shape"
    words = {"truth": "yes" if truth else "no", "lie": "no" if truth else "yes"}
    question, response = rng.choice(ABOUT_ONE)
    words |= {"shape": shape, "color": color, "guess": guess}
    return question.format(**words), response.format(**words)


def _lone_shapes(count: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Kinds, colors and tints (B,) of pictures with one free shape."""
    sizes = (len(SHAPES), len(COLORS), len(TINTS))
    return tuple(rng.integers(size, size=count) for size in sizes)


def pretraining(seed: int, batch: int, images: bool = True) -> Iterator[Batch]:
    """Endless batches of upstream skills on training scenes, in the shares of MIXTURE.

    Without images the words are the same, but nothing is drawn.
    """
    scenery, paint = (np.random.default_rng((WORLD_SEED, seed, i)) for i in range(2))
    words = random.Random(f"{WORLD_SEED} pretraining {seed}")
    while True:
        pictures, turns = [], []
        for task, share in zip(
            MIXTURE, scenery.multinomial(batch, list(MIXTURE.values())), strict=True
        ):
            if task == "one":
                kinds, colors, tints = _lone_shapes(share, scenery)
                turns += [_about_one(*pair, words) for pair in zip(kinds, colors, strict=True)]
                pictures += [draw_free(kinds, colors, tints, paint)[0]] if images else []
                continue
            scenes = _scenes(task, "train", share, scenery)
            pairs = zip(scenes.kinds, scenes.colors, strict=True)
            turns += [_turn(task, *pair, words)[:2] for pair in pairs]
            pictures += [scenes.draw(paint)] if images else []
        drawn = np.concatenate(pictures) if images else None
        yield Batch(drawn, [q for q, _ in turns], [r for _, r in turns])


def patches(seed: int, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Endless pictures (B, 32, 32, 3) uint8 with what each quarter shows: kinds and colors (B, 4).

    A quarter's kind is -1 if it is empty. One picture in four has a free shape, which may lie
    across quarters; the others are training scenes.
    """
    rng = np.random.default_rng((WORLD_SEED, seed, 2))
    while True:
        grid = _scenes("caption", "train", batch - batch // 4, rng)
        kind, color, tint = _lone_shapes(batch // 4, rng)
        free, cover = draw_free(kind, color, tint, rng)
        kinds = np.where(cover > 6, kind[:, None], -1)
        yield (
            np.concatenate([grid.draw(rng), free]),
            np.concatenate([grid.kinds, kinds]),
            np.concatenate([grid.colors, np.repeat(color[:, None], CELLS, 1)]),
        )


def token_counts(seed: int, batches: int, batch: int) -> Counter[str]:
    """How often each word occurs in the first `batches` batches of a pretraining run."""
    counts: Counter[str] = Counter()
    for items in islice(pretraining(seed, batch, images=False), batches):
        for text in (*items.questions, *items.responses):
            counts.update(text.split())
    return counts


def vocabulary() -> list[str]:
    """Every word of the world, sorted; special tokens excluded."""
    templates = [phrase for phrases in PHRASINGS.values() for phrase in phrases]
    templates += [question for question, _ in ABOUT_ONE]
    words = {word for text in templates for word in text.split() if "{" not in word}
    words |= {"object", "objects", "icon", "icons", "yes", "no", ",", EMPTY}
    return sorted(words.union(COLORS, KINDS, PLACES, NUMBERS, REPEATED))
