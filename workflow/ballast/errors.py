"""The errors that a user can cause or must be told about."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class BallastError(Exception):
    """Any error whose message is meant for the user as it stands."""


class SuiteError(BallastError):
    """A suite that cannot be run: names the key, the value, what is allowed and what to do."""


class MethodError(BallastError):
    """A method file that breaks the contract of `methods/`."""


class DataError(BallastError):
    """Data or a base that is missing, damaged, or not what the suite says it is."""


class Damaged(DataError):
    """A file that is missing, or whose content is not what was written: to be made again."""


class Diverged(BallastError):
    """Training left the numbers: a loss or gradient that is NaN or infinite."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Sentence for a name that is not known, with the nearest known one.

    >>> unknown("method", "loar", ["lora", "dora"])
    "unknown method 'loar'; did you mean 'lora'? known: dora, lora"
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {what} {name!r}{hint} known: {', '.join(known) or 'none'}"
