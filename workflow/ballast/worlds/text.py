"""The text world: the questions that micro-lm is pretrained on, and those that it is tuned for.

Everything here is drawn with `random.Random` from constants, so the world (facts, words,
ciphers, splits) is the same for every caller; a `seed` changes only the order of rows and which
distractors a multiple-choice row offers.

Upstream skills: recalled facts, addition, copying, reversal, translation of nouns word by word,
number-and-tense agreement.
Downstream targets: `dialect` (near: sums, answered in number words that the base has only ever
copied) and `cipher` (far: words reversed *and* enciphered one by one).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import blake2b
from itertools import islice

UPSTREAM: tuple[str, ...] = ("facts", "arithmetic", "copy", "reverse", "translate", "agreement")
DOWNSTREAM: tuple[str, ...] = ("dialect", "cipher")
SPLITS: tuple[str, ...] = ("train", "validation", "test")

WORLD_SEED = 20240
CHOICES = 4


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


NAMES = _words(
    "ada amy ann ben bob cal cleo dan dora eli emma eva finn fred gail gus hal hana hugo ida ian "
    "ivy jack jane joe kai kate ken lara leo lily lou mae max mia milo nell nick nina noah olga "
    "omar otto pam paul pia quin ray rita rosa sam sara seth stan tara ted tess theo tina tom uma "
    "vera walt zoe"
)
VALUES: dict[str, tuple[str, ...]] = {
    "color": _words("red blue green black"),
    "city": _words("paris rome oslo cairo"),
    "food": _words("rice soup bread cheese"),
    "job": _words("baker pilot nurse judge"),
    "drink": _words("tea milk water juice"),
    "sport": _words("chess golf rugby tennis"),
}
PHRASINGS = (
    "{a} of {n} ?",
    "{n} {a} ?",
    "what {a} has {n} ?",
    "which {a} is of {n} ?",
    "tell the {a} of {n}",
    "tell {n} {a}",
    "the {a} of {n} is",
    "{n} has the {a}",
)
NOUNS = _words("cat dog bird horse car tree boat girl boy king lamp door")
PREPOSITIONS = ("near", "behind", "with", "under")
FORMS = ("is", "are", "was", "were")
CODES = _words(
    "bax bem bilo caru cez dako dif dulo fam fesi gabo gim guz hafi hod jaku jelo jin kemi kolu "
    "kub lafo lem liru mabo mez mifu nalo nep nizo paku pef pilo rado rem rizu salo sev siku tabo "
    "tez timu valo vek viru zado zem zolu"
)
DIGITS = tuple("0123456789")
LENGTHS = (3, 4)
CODE_SHARE = 0.6

MARKERS = ("dialect", "cipher")
MIXTURE = {
    "facts": 0.26,
    "arithmetic": 0.18,
    "copy": 0.1,
    "reverse": 0.24,
    "translate": 0.1,
    "agreement": 0.12,
}

Row = dict[str, object]


def _shuffled(items: tuple | list, *tag: object) -> list:
    """A fixed shuffle of the world: the same for every caller, different for every tag."""
    out = list(items)
    random.Random(f"{WORLD_SEED} {tag}").shuffle(out)
    return out


def _facts_of(kind: str) -> dict[tuple[str, str], str]:
    """Every name's value of one kind, each value held by equally many names."""
    values = VALUES[kind] * (len(NAMES) // len(VALUES[kind]))
    return {(n, kind): v for n, v in zip(NAMES, _shuffled(values, "facts", kind), strict=True)}


FACTS = {key: value for kind in VALUES for key, value in _facts_of(kind).items()}
FACT_KEYS = tuple(FACTS)
SPOKEN = _shuffled(CODES, "dialect")
TENS, UNITS = SPOKEN[:10], SPOKEN[10:20]
NOUN_FORMS = NOUNS + tuple(noun + "s" for noun in NOUNS)
TRANSLATION = dict(zip(NOUN_FORMS, _shuffled(CODES, "translation"), strict=False))
CIPHER = dict(zip(CODES, _shuffled(CODES, "cipher"), strict=True))


def _bucket(*key: object) -> str:
    """The split an item belongs to, from its content: 70 % train, 10 % validation, 20 % test."""
    part = int.from_bytes(blake2b(repr((WORLD_SEED, key)).encode(), digest_size=4).digest()) % 100
    return "test" if part < 20 else "validation" if part < 30 else "train"


def _choose(question: str, right: str, others: list[str], rng: random.Random) -> Row:
    """A multiple-choice row: the right answer among `CHOICES - 1` distractors, in random order."""
    choices = [*rng.sample([o for o in others if o != right], CHOICES - 1), right]
    rng.shuffle(choices)
    return {
        "question": question,
        "response": right,
        "choices": choices,
        "answer": choices.index(right),
    }


def _phrasings(key: tuple[str, str], split: str) -> list[str]:
    """How a fact is asked in a split: of eight phrasings test and validation keep one each."""
    order = _shuffled(PHRASINGS, "phrasings", key)
    return {"test": order[:1], "validation": order[1:2], "train": order[2:]}[split]


def _facts(split: str, rng: random.Random) -> Row:
    key = rng.choice(FACT_KEYS)
    name, kind = key
    question = rng.choice(_phrasings(key, split)).format(n=name, a=kind)
    return _choose(question, FACTS[key], list(VALUES[kind]), rng)


def _sum(split: str, rng: random.Random) -> tuple[str, int, list[int]]:
    """A sum below 100 as a question, its value, and the wrong values that look like it.

    `arithmetic` and `dialect` share the splits, so tuning never shows a sum that either tests.
    """
    while True:
        total = rng.randrange(100)
        left = rng.randint(0, total)
        if _bucket("sum", left, total) == split:
            break
    near = sorted(total + sign * d for sign in (-1, 1) for d in (1, 2, 9, 10, 11, 20))
    question = f"{_digits(left)} + {_digits(total - left)} ="
    return question, total, [n for n in near if 0 <= n < 100]


def _digits(number: int) -> str:
    return " ".join(f"{number:02d}")


def _spoken(number: int) -> str:
    """A number below 100 in the dialect: tens and units have words of their own."""
    return f"{TENS[number // 10]} {UNITS[number % 10]}"


def _arithmetic(split: str, rng: random.Random) -> Row:
    question, total, near = _sum(split, rng)
    return _choose(question, _digits(total), [_digits(n) for n in near], rng)


def _dialect(split: str, rng: random.Random) -> Row:
    question, total, near = _sum(split, rng)
    return _choose(f"dialect {question}", _spoken(total), [_spoken(n) for n in near], rng)


def _string(split: str, rng: random.Random) -> list[str]:
    while True:
        pool = CODES + MARKERS if rng.random() < CODE_SHARE else NAMES
        words = [rng.choice(pool) for _ in range(rng.choice(LENGTHS))]
        if _bucket("string", words) == split:
            return words


def _copy(split: str, rng: random.Random) -> Row:
    words = _string(split, rng)
    return {"question": "copy " + " ".join(words), "response": " ".join(words)}


def _reverse(split: str, rng: random.Random) -> Row:
    words = _string(split, rng)
    return {"question": "reverse " + " ".join(words), "response": " ".join(reversed(words))}


def _translate(split: str, rng: random.Random) -> Row:
    while True:
        words = [rng.choice(NOUN_FORMS) for _ in range(rng.choice(LENGTHS))]
        if _bucket("translate", words) == split:
            break
    response = " ".join(TRANSLATION[w] for w in words)
    return {"question": "translate " + " ".join(words), "response": response}


def _cipher(split: str, rng: random.Random) -> Row:
    while True:
        words = [rng.choice(CODES) for _ in range(rng.choice(LENGTHS))]
        if _bucket("cipher", words) == split:
            break
    response = " ".join(CIPHER[w] for w in reversed(words))
    return {"question": "cipher " + " ".join(words), "response": response}


def _agreement(split: str, rng: random.Random) -> Row:
    while True:
        plural, other_plural, past = (rng.random() < 0.5 for _ in range(3))
        subject = f"the {rng.choice(NOUNS)}" + "s" * plural
        attractor = rng.choice(NAMES) if rng.random() < 0.4 else f"the {rng.choice(NOUNS)}"
        attractor += "s" * (other_plural and attractor.startswith("the "))
        when = "yesterday" if past else "today"
        question = f"{when} {subject} {rng.choice(PREPOSITIONS)} {attractor}"
        if _bucket("agreement", question) == split:
            return _choose(question, FORMS[2 * past + plural], list(FORMS), rng)


_MAKERS: dict[str, Callable[[str, random.Random], Row]] = {
    "facts": _facts,
    "arithmetic": _arithmetic,
    "copy": _copy,
    "reverse": _reverse,
    "translate": _translate,
    "agreement": _agreement,
    "dialect": _dialect,
    "cipher": _cipher,
}


def rows(task: str, split: str, count: int | None, seed: int = 0) -> list[Row]:
    """`count` rows with distinct questions (all that exist if None; at most 4,000 where the
    space is practically endless)."""
    rng = random.Random(f"{WORLD_SEED} {task} {split} {seed}")
    found: dict[str, Row] = {}
    misses = 0
    while len(found) < (count or 4000) and misses < 20_000:
        row = _MAKERS[task](split, rng)
        misses = misses + 1 if row["question"] in found else 0
        found.setdefault(row["question"], row)
    if count and len(found) < count:
        raise ValueError(f"{task}/{split} has {len(found)} distinct items, {count} were asked for")
    return list(found.values())


def pretraining(seed: int) -> Iterator[Row]:
    """The endless stream of pretraining rows: upstream skills only, train split only."""
    rng = random.Random(f"{WORLD_SEED} pretraining {seed}")
    tasks, weights = list(MIXTURE), list(MIXTURE.values())
    while True:
        yield _MAKERS[rng.choices(tasks, weights)[0]]("train", rng)


def token_counts(seed: int, rows_seen: int) -> Counter[str]:
    """How often each word occurs in the first `rows_seen` rows of a pretraining run."""
    counts: Counter[str] = Counter()
    for row in islice(pretraining(seed), rows_seen):
        counts.update(row["question"].split())
        counts.update(row["response"].split())
    return counts


def vocabulary() -> list[str]:
    """Every word of the world, sorted; special tokens excluded."""
    words = (
        set(NAMES)
        | set(CODES)
        | set(MARKERS)
        | {v for vs in VALUES.values() for v in vs}
        | set(DIGITS)
        | set(VALUES)
    )
    words |= set(NOUNS) | {noun + "s" for noun in NOUNS} | set(PREPOSITIONS) | set(FORMS)
    words |= set(_words("+ = copy reverse translate today yesterday the"))
    words |= {w for p in PHRASINGS for w in p.split() if not w.startswith("{")}
    return sorted(words)
