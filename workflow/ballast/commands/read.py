"""Commands that read results: compare, show, recommend."""

from __future__ import annotations

from typing import Annotated

import typer

from ballast.commands.options import JsonOption, ResultsOption, SuiteOption, opened
from ballast.layout import Layout

BaseOption = Annotated[str | None, typer.Option("--base", help="Of this base.")]
TargetOption = Annotated[str | None, typer.Option("--target", help="Tuned on this target.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command()(compare)
    app.command()(show)
    app.command()(recommend)


def compare(
    a: Annotated[str, typer.Argument(help="A row like lora-r8, a cell's id, or its beginning.")],
    b: Annotated[str, typer.Argument(help="What to compare it with.")],
    suite: SuiteOption = None,
    results: ResultsOption = None,
    base: BaseOption = None,
    target: TargetOption = None,
    json: JsonOption = False,
) -> int:
    """Compare two rows or two cells: what differs, and by how much more than the noise."""
    from ballast.commands.compare import compare_all, show_comparisons
    from ballast.commands.screen import Screen, print_json

    found = compare_all(opened(suite, results), a, b, base, target)
    if json:
        print_json(found)
    else:
        show_comparisons(found, Screen())
    return 0


def show(
    name: Annotated[str, typer.Argument(help="A cell's id or its beginning, or a row: lora-r8.")],
    suite: SuiteOption = None,
    results: ResultsOption = None,
    base: BaseOption = None,
    target: TargetOption = None,
    samples: Annotated[int, typer.Option(min=0, help="Of gained and of lost items.")] = 3,
    json: JsonOption = False,
) -> int:
    """Show all that is known of a cell, or of a row over its seeds."""
    from ballast.commands.screen import Screen, print_json
    from ballast.commands.show import describe
    from ballast.commands.show_text import show_described
    from ballast.commands.source import kept_folder

    read = opened(suite, results)
    kept = kept_folder(suite, results, Layout.here())
    found = describe(read, name, base, target, samples, kept)
    if json:
        print_json(found)
    else:
        show_described(found, Screen())
    return 0


def recommend(
    suite: SuiteOption = None,
    results: ResultsOption = None,
    base: BaseOption = None,
    target: TargetOption = None,
    memory: Annotated[
        float | None, typer.Option(min=0, help="At most so many MB of memory in training.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="At most so many seconds of training.")
    ] = None,
    forgetting: Annotated[
        float | None, typer.Option(min=0, help="At most so many points of F lost.")
    ] = None,
    parameters: Annotated[
        float | None, typer.Option(min=0, help="At most so many trained parameters.")
    ] = None,
    adapter_mb: Annotated[
        float | None, typer.Option("--adapter-mb", min=0, help="At most so many MB of adapter.")
    ] = None,
    json: JsonOption = False,
) -> int:
    """Recommend a method and rank under limits, and say how sure that is."""
    from ballast.commands.recommend import advise, show_advice
    from ballast.commands.screen import Screen, print_json
    from ballast.commands.source import one_place

    found = opened(suite, results)
    place = one_place(found.places(), base, target)
    limits = {
        "memory_mb": memory, "seconds": seconds, "forgetting": forgetting,
        "parameters": parameters, "adapter_mb": adapter_mb,
    }  # fmt: skip
    advice = advise(found, *place, {k: v for k, v in limits.items() if v is not None})
    if json:
        print_json(advice)
    else:
        show_advice(advice, Screen())
    return 0
