"""Templates, styles and code that are shipped with this package."""

from __future__ import annotations

import importlib.resources
from functools import cache

import jinja2


@cache
def environment() -> jinja2.Environment:
    """Templates of this package; everything that they print is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("ballast.site", "assets"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def asset(name: str) -> str:
    """Text of a file of this package."""
    return (importlib.resources.files("ballast.site") / "assets" / name).read_text("utf-8")
