"""The text world for an encoder: what micro-encoder is pretrained on, and classified by.

The same facts, words and splits as `worlds.text`, written as sentences with a gap, or as a pair of
a request and an answer, and drawn with `random.Random` from constants in the same way.

Upstream skills, scored by the tokens at `<mask>`: recalled facts, values read in a sentence beside
(where it speaks of the same person; otherwise recalled), number-and-tense agreement, copying,
reversal, translation of nouns word by word.
Downstream targets, made of words that pretraining has seen, in new ways:
`entails` (near; after RTE): does the second sentence follow from the first? Both speak of facts,
    in two phrasings; values are drawn at random, so that what the base recalls does not answer.
`acceptable` (near; after CoLA): is the verb form of a sentence the right one?
`true` (far): is a statement true in the world? Facts of the test are in no training row, so that
    what was pretrained has to be at hand still.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

from ballast.worlds import text

UPSTREAM: tuple[str, ...] = ("facts", "read", "agreement", "copy", "reverse", "translate")
DOWNSTREAM: tuple[str, ...] = ("entails", "acceptable", "true")

MASK = "<mask>"
STATEMENTS = (
    "the {a} of {n} is {v}",
    "{n} has the {a} {v}",
    "{v} is the {a} of {n}",
    "the {a} {v} is of {n}",
    "{a} of {n} ? {v}",
    "what {a} has {n} ? {v}",
    "tell {n} {a} {v}",
    "{n} {a} is {v}",
)
NOT_ENTAILED, ENTAILED = 0, 1
UNACCEPTABLE, ACCEPTABLE = 0, 1
TRUE_SHARE = 0.4

MIXTURE = {
    "facts": 0.5,
    "read": 0.14,
    "agreement": 0.08,
    "copy": 0.04,
    "reverse": 0.14,
    "translate": 0.1,
}
PAIRED = 0.2  # share of statements that stand beside another one

Row = dict[str, object]


def _statements(key: tuple[str, str], split: str) -> list[str]:
    """How a fact is stated in a split: of eight phrasings test and validation keep one each."""
    order = text._shuffled(STATEMENTS, "statements", key)
    return {"test": order[:1], "validation": order[1:2], "train": order[2:]}[split]


def _facts(split: str, rng: random.Random) -> Row:
    name, kind = key = rng.choice(text.FACT_KEYS)
    sentence = rng.choice(_statements(key, split)).format(n=name, a=kind, v=MASK)
    return {"question": sentence, "response": text.FACTS[key]}


def _agreement(split: str, rng: random.Random) -> Row:
    row = text._agreement(split, rng)
    return {"question": f"{row['question']} {MASK}", "response": row["response"]}


def _read(split: str, rng: random.Random) -> Row:
    """A value at random beside a gap: of the same person it is the answer, of another it is not."""
    while True:
        name, kind = rng.choice(text.FACT_KEYS)
        one, two = rng.sample(STATEMENTS, 2)
        about = name if rng.random() < 0.7 else rng.choice(text.NAMES)
        value = rng.choice(text.VALUES[kind])
        beside = one.format(n=about, a=kind, v=value)
        gap = two.format(n=name, a=kind, v=MASK)
        if text._bucket("read", beside, gap) == split:
            answer = value if about == name else text.FACTS[name, kind]
            return {"question": beside, "pair": gap, "response": answer}


def _request(maker: Callable[[str, random.Random], Row]) -> Callable[[str, random.Random], Row]:
    """A request of the text world, its answer masked word by word in the second sentence."""

    def make(split: str, rng: random.Random) -> Row:
        row = maker(split, rng)
        gaps = " ".join(MASK for _ in str(row["response"]).split())
        return {"question": row["question"], "pair": gaps, "response": row["response"]}

    return make


def _classified(question: str, pair: str | None, names: tuple[str, str], answer: int) -> Row:
    row: Row = {"question": question, "choices": list(names), "answer": answer}
    return row | {"response": names[answer]} | ({"pair": pair} if pair else {})


def _entails(split: str, rng: random.Random) -> Row:
    """Two sentences on one fact, or on two that differ in the name or in the value.

    The value is any of its kind: a premise may be false in the world, so that it has to be read.
    """
    while True:
        name, kind = rng.choice(text.FACT_KEYS)
        value = rng.choice(text.VALUES[kind])
        one, two = rng.sample(STATEMENTS, 2)
        answer = rng.randrange(2)
        others = (name, value)
        if answer == NOT_ENTAILED:
            if rng.random() < 0.5:
                others = (rng.choice([n for n in text.NAMES if n != name]), value)
            else:
                others = (name, rng.choice([v for v in text.VALUES[kind] if v != value]))
        premise = one.format(n=name, a=kind, v=value)
        hypothesis = two.format(n=others[0], a=kind, v=others[1])
        if text._bucket("entails", premise, hypothesis) == split:
            return _classified(premise, hypothesis, ("not_entailed", "entailed"), answer)


def _acceptable(split: str, rng: random.Random) -> Row:
    row = text._agreement(split, rng)
    answer = rng.randrange(2)
    form = row["response"]
    if answer == UNACCEPTABLE:
        form = rng.choice([other for other in text.FORMS if other != form])
    sentence = f"{row['question']} {form}"
    return _classified(sentence, None, ("unacceptable", "acceptable"), answer)


def _true(split: str, rng: random.Random) -> Row:
    answer = int(rng.random() < TRUE_SHARE)
    while True:
        key = name, kind = rng.choice(text.FACT_KEYS)
        if text._bucket("true", key) == split:
            break
    value = text.FACTS[key]
    if not answer:
        value = rng.choice([other for other in text.VALUES[kind] if other != value])
    # Training does not state what the facts upstream are tested by.
    phrasings = _statements(key, "train") if split == "train" else STATEMENTS
    sentence = rng.choice(phrasings).format(n=name, a=kind, v=value)
    return _classified(sentence, None, ("no", "yes"), answer)


_MAKERS: dict[str, Callable[[str, random.Random], Row]] = {
    "facts": _facts,
    "read": _read,
    "agreement": _agreement,
    "copy": _request(text._copy),
    "reverse": _request(text._reverse),
    "translate": _request(text._translate),
    "entails": _entails,
    "acceptable": _acceptable,
    "true": _true,
}


def _identity(row: Row) -> tuple[object, object]:
    return row["question"], row.get("pair")


def rows(task: str, split: str, count: int | None, seed: int = 0) -> list[Row]:
    """`count` distinct rows (all that exist if None; at most 4,000).

    Raises ValueError if there are fewer than asked for.
    """
    rng = random.Random(f"{text.WORLD_SEED} encoder {task} {split} {seed}")
    found: dict[tuple[object, object], Row] = {}
    misses = 0
    while len(found) < (count or 4000) and misses < 20_000:
        row = _MAKERS[task](split, rng)
        misses = misses + 1 if _identity(row) in found else 0
        found.setdefault(_identity(row), row)
    if count and len(found) < count:
        raise ValueError(f"{task}/{split} has {len(found)} distinct items, {count} were asked for")
    return list(found.values())


def pretraining(seed: int) -> Iterator[Row]:
    """The endless stream of pretraining rows: upstream skills only, train split only.

    A share of the statements stand as pairs, so that a sentence beside another is nothing new.
    """
    rng = random.Random(f"{text.WORLD_SEED} encoder pretraining {seed}")
    tasks, weights = list(MIXTURE), list(MIXTURE.values())
    while True:
        row = _MAKERS[rng.choices(tasks, weights)[0]]("train", rng)
        if "pair" not in row and rng.random() < PAIRED:
            other = _MAKERS[rng.choice(("facts", "agreement"))]("train", rng)
            row |= {"pair": other["question"]}
            row["response"] = f"{row['response']} {other['response']}"
        yield row


def filled(row: Row) -> tuple[list[list[str]], list[list[bool]]]:
    """The words of a masked row's sentences with its gaps filled, and which of them were gaps."""
    answers = iter(str(row["response"]).split())
    words, gaps = [], []
    for sentence in (row["question"], row.get("pair")):
        if sentence:
            parts = str(sentence).split()
            gaps.append([word == MASK for word in parts])
            words.append([next(answers) if word == MASK else word for word in parts])
    return words, gaps


def token_counts(seed: int, rows_seen: int) -> Counter[str]:
    """How often each word occurs in the first `rows_seen` rows of a pretraining run."""
    counts: Counter[str] = Counter()
    for row in islice(pretraining(seed), rows_seen):
        for sentence in filled(row)[0]:
            counts.update(sentence)
    return counts


def vocabulary() -> list[str]:
    """Every word of the world, sorted; special tokens excluded."""
    return text.vocabulary()
