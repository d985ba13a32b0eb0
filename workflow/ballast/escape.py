"""Text from elsewhere (names, titles, reasons) made harmless for each format that shows it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from ballast.files import key_of


def one_line(text: str) -> str:
    """The text without control characters, line breaks or runs of blanks."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def slug(text: str) -> str:
    """A file name from any text: letters, digits, dot, underscore and hyphen, at most 120."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")[:120] or "table"


def file_names(places: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """A file name for each base and target, safe on every disk; a hash tells equal ones apart."""
    plain = {where: slug(f"{where[0]}-{where[1]}") for where in places}
    taken = [name.lower() for name in plain.values()]
    return {
        where: name if taken.count(name.lower()) == 1 else f"{name}-{key_of(*where, length=6)}"
        for where, name in plain.items()
    }


def shorten(text: str, longest: int) -> str:
    """The text cut to `longest` characters, with an ellipsis if it was longer."""
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"


@lru_cache(maxsize=65536)
def markdown(text: str) -> str:
    """Text that Markdown shows as it is, inside a table's cell too; HTML in it stays text."""
    text = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore inside a word is plain text in GitHub's Markdown.
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", re.sub(r"([\\`*\[\]|~$!#])", r"\\\1", text))
    return re.sub(r"(?i)\b(https?|www)(?=[:.])", r"\1&#8203;", text)


_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "_": r"\_", "%": r"\%", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''",
    "[": "{[}", "]": "{]}", "*": "{*}", "`": r"\textasciigrave{}", "-": r"{-}",
    "Δ": r"$\Delta$", "±": r"$\pm$", "−": r"$-$", "×": r"$\times$", "α": r"$\alpha$",
    "β": r"$\beta$", "λ": r"$\lambda$", "≥": r"$\geq$", "≤": r"$\leq$", "…": r"\ldots{}",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "°": r"$^\circ$", "‡": r"$\ddagger$",
    "τ": r"$\tau$", "‖": r"$\|$", "‑": "{-}", "Σ": r"$\Sigma$", "σ": r"$\sigma$", "‐": "{-}",
    "ᵀ": r"$^T$", "₀": r"$_0$", "ₖ": r"$_k$",
    "→": r"$\rightarrow$", "∞": r"$\infty$", "√": r"$\surd$", "·": r"$\cdot$", "’": "'",
    "“": "``", "”": "''",
}  # fmt: skip


@lru_cache(maxsize=65536)
def latex(text: str) -> str:
    """Text for LaTeX: its specials escaped; characters beyond Latin named by their code point.

    A bracket or star at the start of a row would be read as an argument of the row before it.
    """
    return "".join(_LATEX.get(c) or _latin(c) for c in one_line(text))


def _latin(c: str) -> str:
    return c if ord(c) < 0x180 or c == "–" else f"{{[}}U+{ord(c):04X}{{]}}"
