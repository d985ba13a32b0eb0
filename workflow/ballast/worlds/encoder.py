"""The text world for an encoder: what micro-encoder is pretrained on, and classified by.

The same facts, words and splits as `worlds.text`, written as sentences with a gap, or as a pair of
a request and an answer, and drawn with `random.Random` from constants in the same way.

Upstream skills, scored by the tokens at `<mask>`: recalled facts, values read in a sentence beside
(where it speaks of the same person; otherwise recalled), number-and-tense agreement, copying,
reversal, translation of nouns word by word.
Downstream targets, made of words that pretraining has seen, in new ways:
`entails` (near; after RTE): does the second sentence follow from the first, a fact in another
    phrasing? It may be false, or true of somebody else.
`acceptable` (near; after CoLA): is the verb form of a sentence the right one?
`true` (far): is a statement true in the world? Facts of the test are in no training row, so that
    what was pretrained has to be at hand still.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator

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
# What is classified ends with the value, as sentences of `acceptable` do with the verb.
ENDING = tuple(statement for statement in STATEMENTS if statement.endswith("{v}"))
NOT_ENTAILED, ENTAILED = 0, 1
UNACCEPTABLE, ACCEPTABLE = 0, 1
TRUE_SHARE = 0.4
OTHERS_SHARE = 0.3  # of what is not entailed

# Facts alone come first: beside the other skills they are learned late, or not at all.
FIRST = 20_000
FIRST_MIXTURE = {"facts": 0.85, "agreement": 0.05, "copy": 0.05, "translate": 0.05}
MIXTURE = {
    "facts": 0.36,
    "read": 0.3,
    "agreement": 0.06,
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
        about = name if rng.random() < 0.85 else rng.choice(text.NAMES)
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
    """A fact of the world, and the same in other words, a false one or another person's.

    What follows from the first sentence is more than what is true: the other person's fact is.
    """
    while True:
        name, kind = rng.choice(text.FACT_KEYS)
        value = text.FACTS[name, kind]
        two = rng.choice(ENDING)
        one = rng.choice([statement for statement in STATEMENTS if statement != two])
        answer = rng.randrange(2)
        who, what = name, value
        if answer == NOT_ENTAILED and rng.random() < OTHERS_SHARE:
            who = rng.choice([other for other in text.NAMES if other != name])
            what = text.FACTS[who, kind]
        elif answer == NOT_ENTAILED:
            what = rng.choice([other for other in text.VALUES[kind] if other != value])
        premise = one.format(n=name, a=kind, v=value)
        hypothesis = two.format(n=who, a=kind, v=what)
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
    known = _statements(key, "train") if split == "train" else STATEMENTS
    phrasing = rng.choice([statement for statement in known if statement in ENDING])
    sentence = phrasing.format(n=name, a=kind, v=value)
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
    for number in itertools.count():
        mixture = FIRST_MIXTURE if number < FIRST else MIXTURE
        (task,) = rng.choices(list(mixture), list(mixture.values()))
        row = _MAKERS[task]("train", rng)
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
    for row in itertools.islice(pretraining(seed), rows_seen):
        for sentence in filled(row)[0]:
            counts.update(sentence)
    return counts


def vocabulary() -> list[str]:
    """Every word of the world, sorted; special tokens excluded."""
    return text.vocabulary()
