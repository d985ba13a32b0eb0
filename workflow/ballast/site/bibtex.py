"""BibTeX of a method from the citation that its file declares.

Only what the citation says enters an entry: authors' family names ("and others" for "et al."),
title, venue and year, arXiv id. A citation of another form is kept whole as the entry's note.
"""

from __future__ import annotations

import re

from ballast.escape import latex, one_line

_NAME = r"[A-ZÀ-ÞŁŠŽ][\w'’-]*(?: [A-ZÀ-ÞŁŠŽ][\w'’-]*)?"
_AUTHORS = re.compile(
    rf"(?:baseline of )?(?P<authors>{_NAME} et al\.|(?:{_NAME}, )*{_NAME} and {_NAME}|{_NAME}), "
)
_TITLE = re.compile(
    r"(?P<title>.+?), (?:(?P<venue>[A-Z][A-Za-z.-]*(?: [A-Z][A-Za-z.-]*)*) )?"
    r"(?P<year>(?:19|20)\d\d)"
    r"(?:, arXiv:(?P<eprint>\d{4}\.\d{4,5}))?(?P<rest>.*)"
)


def entries(method: str, title: str, citation: str | None) -> str:
    """The @misc entries of a method, one for each work that its citation names.

    Keys are the method's name, then name-2 and so on. Without a citation the entry says so.
    """
    if not citation:
        return _entry(method, [("title", title), ("note", "no citation declared")])
    works = [one_line(part) for part in citation.split("; ") if part.strip()]
    found = []
    for at, work in enumerate(works, 1):
        found.append(_entry(method if at == 1 else f"{method}-{at}", _fields(work, title)))
    return "\n\n".join(found)


def _fields(work: str, title: str) -> list[tuple[str, str]]:
    """Fields of one cited work, in the order of an entry."""
    authors = _AUTHORS.match(work)
    rest = _TITLE.fullmatch(work[authors.end() :]) if authors else None
    if authors is None or rest is None:
        return [("title", title), ("note", work)]
    found = [
        ("author", _authors(authors["authors"])),
        ("title", rest["title"]),
        ("howpublished", rest["venue"]),
        ("year", rest["year"]),
        ("eprint", rest["eprint"]),
        ("archivePrefix", "arXiv" if rest["eprint"] else None),
        ("note", rest["rest"].strip(" ,")),
    ]
    return [(name, value) for name, value in found if value]


def _authors(text: str) -> str:
    text = text.replace(" et al.", " and others")
    return re.sub(r",(?: and)? ", " and ", text)


def _entry(key: str, fields: list[tuple[str, str]]) -> str:
    key = re.sub(r"[^A-Za-z0-9_.:+-]+", "-", key) or "method"
    lines = [f"  {name} = {{{_text(name, value)}}}," for name, value in fields]
    return "\n".join([f"@misc{{{key},", *lines, "}"])


def _text(name: str, value: str) -> str:
    r"""Text for a field: BibTeX counts braces even where a backslash is before them.

    Titles get braces of their own, because styles would change their capitals.
    """
    text = latex(value).replace(r"\{", r"\textbraceleft{}").replace(r"\}", r"\textbraceright{}")
    text = text.replace("{-}", "-")
    return f"{{{text}}}" if name == "title" else text
