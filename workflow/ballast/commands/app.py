"""The command line: which commands there are, and how errors reach the user."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.main import get_command

from ballast.commands import peft, plan, read, share, tools, work
from ballast.errors import BallastError
from ballast.escape import one_line
from ballast.faults import fault_of

RUN, READ, SHARE, TOOLS = "Run", "Read results", "Share results", "Tools"

app = typer.Typer(
    name="ballast",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"ballast {version('ballast')}")
        raise typer.Exit


@app.callback()
def ballast(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tuning methods compared: what each learns, what it forgets, what it costs.

    Suites are run with `snakemake`; these commands are what is not a target of the workflow.
    """


for group in (work, plan, read, share, tools):
    group.add_to(app)
app.add_typer(peft.app, name="peft")


def main(arguments: list[str] | None = None) -> int:
    """Run a command; errors of the user's are one line on standard error and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = get_command(app).main(
            list(arguments) or ["--help"], prog_name="ballast", standalone_mode=False
        )
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (BallastError, typer.TyperException) as error:
        print(f"ballast: {_text(error)}", file=sys.stderr)
        return 2
    except typer.Abort:
        return 130
    except BrokenPipeError:
        # What still lies in the buffer would be an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        text = fault_of(error, Path("results"))
        if text is None:
            raise
        print(f"ballast: {text}", file=sys.stderr)
        return 2


def _text(error: Exception) -> str:
    if isinstance(error, typer.TyperException):
        return one_line(error.format_message()) + " (--help lists what there is)"
    return str(error)
