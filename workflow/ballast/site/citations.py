"""What the method files declare about their papers, for the page's BibTeX."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from ballast.declare import discover
from ballast.errors import BallastError
from ballast.layout import Layout
from ballast.site.bibtex import entries


@cache
def _declared() -> dict[str, str]:
    try:
        found = discover(Layout.here().methods)
    except (BallastError, OSError):  # results can be shown without the checkout that made them
        return {}
    return {name: file.declaration.citation for name, file in found.items()}


def citations() -> Callable[[str, str], dict[str, str]]:
    """A function of a method's name and title: its `citation` and `bibtex`.

    The checkout's method files are read once; a method that is not among them has no citation.
    """

    def of(method: str, title: str) -> dict[str, str]:
        citation = _declared().get(method, "")
        return {"citation": citation, "bibtex": entries(method, title, citation or None)}

    return of
