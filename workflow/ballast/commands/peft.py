"""Exchange with PEFT's own benchmark: `ballast peft export`, `ballast peft import`."""

from __future__ import annotations

import typer

app = typer.Typer(help="Exchange results with PEFT's own benchmark (its result JSON).")
