"""methods/README.md, made from the files that it lists; nothing in it is written by hand."""

from __future__ import annotations

import ast
import csv
import re
from pathlib import Path

from ballast.declare import FAMILIES, KINDS, MethodFile, _imports, discover
from ballast.twins import PEFT_VERSION, TWINS

PAGE, OVERHEAD = "README.md", "overhead.csv"
MOMENTS = (
    "attach", "calibrate", "initialise", "restored", "parameter_groups", "penalty",
    "after_backward", "after_step", "merge", "post_hoc",
)  # fmt: skip
COLUMNS = (
    "method", "title", "paper", "rank or size", "trainable", "merges", "applies to", "moments",
    f"PEFT {PEFT_VERSION}", "step",
)  # fmt: skip
HEAD = """# Methods

One file each, found by its name. This page is made from the files: `ballast methods --write`.

*trainable*: numbers that train, per adapted matrix [m, n] = [out, in] of rank r unless it says
otherwise. *moments*: which functions a file has, of those in `workflow/ballast/tuner.py`.
*step*: a training step's time over the frozen base's forward and activation-gradient step{where};
PEFT's in brackets. Blank where it was not measured.
"""
# Where a file says in words how much trains: "Trainable per matrix: r (m + n)."
TRAINS = re.compile(r"\bTrain(?:able|ed)\b([^:.]{0,40}): (.+?)\.(?=\s|$)")


def index_text(folder: Path) -> str:
    """The page for a folder of method files, Markdown."""
    files = discover(folder)
    measured, where = overhead(folder / OVERHEAD)
    lines = [HEAD.format(where=f" ({where})" if where else "")]
    for family in FAMILIES:
        members = [file for file in files.values() if file.declaration.family == family]
        if members:
            lines += [f"## {family.capitalize()}", "", _row(COLUMNS), _row(["---"] * len(COLUMNS))]
            lines += [_row(_cells(file, measured)) for file in members]
            lines.append("")
    return "\n".join(lines)


def _cells(file: MethodFile, measured: dict[str, str]) -> list[str]:
    declaration, twin = file.declaration, TWINS.get(file.name)
    size = declaration.rank or (f"`{declaration.size}`" if declaration.size else "")
    everywhere = set(declaration.applies_to) == set(KINDS)
    return [
        f"[{file.name}]({file.path.name})",
        declaration.title,
        declaration.citation,
        size,
        trainable(file.path) if declaration.trains else "nothing",
        "yes" if declaration.merges else "no",
        "all" if everywhere else ", ".join(declaration.applies_to),
        ", ".join(moment for moment in MOMENTS if moment in file.defines),
        twin.text() if twin else "",
        measured.get(file.name, ""),
    ]


def _row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def trainable(path: Path) -> str:
    """How much a method trains, in the words of its file or of the one that it takes it from."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    text = " ".join((ast.get_docstring(tree) or "").split())
    found = TRAINS.findall(text)
    if found:
        about, formula = found[-1]
        about = about.strip(" ,").removeprefix("per matrix").strip()
        return f"{about}: {formula}" if about else formula
    imported = _imports(tree)
    for name in ("parameter_count", "total_parameters", "attach"):
        if name in imported:
            return trainable(path.with_name(f"{imported[name][0]}.py"))
    return ""


def overhead(path: Path) -> tuple[dict[str, str], str]:
    """Measured steps by method, as text, and at which shape; empty where there is no such file.

    The file is the benchmark's steps.csv; of its shapes the one that most methods have counts, the
    largest of those.
    """
    if not path.is_file():
        return {}, ""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    shapes: dict[tuple[int, int, str], list[dict[str, str]]] = {}
    for row in rows:
        key = (int(row["hidden"]), int(row["tokens"]), row["dtype"])
        shapes.setdefault(key, []).append(row)
    hidden, tokens, dtype = max(shapes, key=lambda key: (len(shapes[key]), key))
    found = {}
    for row in shapes[hidden, tokens, dtype]:
        if row.get("ours_over_base"):
            found[row["method"]] = f"{float(row['ours_over_base']):.2f}"
            if row.get("peft_over_base"):
                found[row["method"]] += f" ({float(row['peft_over_base']):.2f})"
    return found, f"hidden {hidden:,}, {tokens:,} tokens, {dtype}"
