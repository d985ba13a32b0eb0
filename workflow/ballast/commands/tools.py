"""Commands beside the results: export, methods, benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ballast.files import write_text
from ballast.layout import Layout


class Spread(TyperCommand):
    """A command whose options take several values: `--hidden 512 2048`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat an option's name before each of its values, as the parser wants them."""
        several = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        spread: list[str] = []
        option = ""
        for word in args:
            if word.startswith("-"):
                option = word if word in several else ""
                spread += [] if option else [word]
            else:
                spread += [option, word] if option else [word]
        return super().parse_args(ctx, spread)


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(export)
    app.command()(methods)
    app.command(cls=Spread)(benchmark)


def export(
    cell: Annotated[str, typer.Argument(help="A cell's folder, its id, or a beginning of that.")],
    folder: Annotated[Path, typer.Argument(help="Where to write.")],
    merged: Annotated[
        bool, typer.Option("--merged", help="Plain weights, not an adapter.")
    ] = False,
) -> int:
    """Take a trained cell to PEFT, vLLM or transformers."""
    from ballast.export import export_cell, find_cell

    layout = Layout.here()
    print(export_cell(find_cell(cell, layout.results), folder, layout, merged))
    return 0


def methods(
    write: Annotated[bool, typer.Option("--write", help="To methods/README.md.")] = False,
) -> int:
    """Say what every file of methods/ is."""
    from ballast.index import PAGE, index_text

    layout = Layout.here()
    text = index_text(layout.methods)
    if write:
        write_text(layout.methods / PAGE, text)
    else:
        print(text)
    return 0


def benchmark(
    folder: Annotated[Path, typer.Argument(help="For steps.csv and benchmark.md.")],
    hidden: Annotated[list[int] | None, typer.Option(help="Widths, one or more.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens of a batch.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="fp32, bf16.")] = None,
    methods: Annotated[list[str] | None, typer.Option(help="Files of methods/; all.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Measurements of each.")] = None,
    rank: Annotated[int | None, typer.Option()] = None,
    layers: Annotated[int | None, typer.Option()] = None,
    generated: Annotated[int | None, typer.Option(help="Tokens to generate.")] = None,
    threads: Annotated[int, typer.Option()] = 2,
) -> int:
    """Measure the price of each method's step."""
    given = {
        "hidden": hidden, "tokens": tokens, "precision": precision, "methods": methods,
        "rounds": rounds, "rank": rank, "layers": layers, "generated": generated,
    }  # fmt: skip
    import torch

    from ballast.benchmark import Settings, write_benchmark
    from ballast.declare import discover

    torch.set_num_threads(threads)
    settings = Settings.of({key: value for key, value in given.items() if value is not None})
    write_benchmark(discover(Layout.here().methods), [], folder, settings)
    return 0
