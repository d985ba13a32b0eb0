"""index.html: data, style, libraries and code in one file that asks for nothing else."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import itables
import plotly.offline
from markupsafe import Markup

from ballast.errors import DataError
from ballast.figures.palette import COLOURS, OTHER
from ballast.files import write_text
from ballast.results import Results
from ballast.site.cells import cell_pages
from ballast.site.data import Analyses, page_data
from ballast.site.templates import asset, environment

SCRIPTS = (
    "text.js", "state.js", "model.js", "table.js", "charts.js", "views.js", "export.js", "app.js",
)  # fmt: skip
STYLES = ("common.css", "page.css")


def write_site(
    results: Results, analyses: Analyses, folder: Path, protocol: str | None = None
) -> list[Path]:
    """Write index.html and cells/ID.html into `folder`; the same results give the same bytes.

    analyses: by base and target; others are not shown. protocol: the published one that the suite
    names. A cell's page is left as it is while what it
    shows has not changed; pages of cells that are gone are removed. Returns the paths, sorted.
    """
    pages = cell_pages(results, folder / "cells")
    index = folder / "index.html"
    links = {cell: f"cells/{path.name}" for cell, path in pages.items()}
    write_text(index, render_page(page_data(results, analyses, links, protocol)))
    return sorted([index, *pages.values()])


def render_page(data: Mapping[str, Any]) -> str:
    """The page that shows `data` (`data.page_data`)."""
    return environment().get_template("page.html.j2").render(
        suite=data["suite"],
        styles=Markup(f"{_bundle('dt_bundle.css')}\n{_family_colours()}\n{_joined(STYLES)}"),
        data=Markup(script_json(data)),
        tables=Markup(_table_module()),
        plotly=Markup(_safe_script(plotly.offline.get_plotlyjs())),
        code=Markup(_joined(SCRIPTS)),
    )  # fmt: skip


def script_json(value: Any) -> str:
    """JSON that may stand in a <script>: nothing in it ends the element or opens a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", r"\u003c").replace("\u2028", r"\u2028").replace("\u2029", r"\u2029")


def _joined(names: tuple[str, ...]) -> str:
    return "\n".join(asset(name).strip() for name in names)


def _bundle(name: str) -> str:
    return (importlib.resources.files(itables) / "html" / name).read_text("utf-8")


def _safe_script(text: str) -> str:
    """A library's script without what an HTML parser would act on inside its strings."""
    return text.replace("<!--", r"\x3C!--").replace("</script", r"\x3C/script")


@cache
def _table_module() -> str:
    """itables' bundle of DataTables, its default export as a global instead.

    Raises DataError if the bundle has no default export where it had one.
    """
    text = _bundle("dt_bundle.js")
    found = list(re.finditer(r"export\s*\{([^}]*)\};?", text))
    name = re.search(r"([\w$]+)\s+as\s+default", found[-1][1]) if found else None
    if name is None:
        raise DataError("itables: dt_bundle.js has no default export; its version is too new")
    start, end = found[-1].span()
    return _safe_script(f"{text[:start]}globalThis.DataTable={name[1]};{text[end:]}")


def _family_colours() -> str:
    """The figures' colours of the families as custom properties."""
    lines = [f"--family-{name}: {colour};" for name, colour in COLOURS.items()]
    return ":root { " + " ".join([*lines, f"--family-other: {OTHER};"]) + " }"
