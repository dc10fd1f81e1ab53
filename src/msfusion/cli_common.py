"""What the commands have in common: options, and how mistakes are told."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer

from msfusion.errors import MsfusionError

if TYPE_CHECKING:
    from rich.console import Console

P = ParamSpec("P")
R = TypeVar("R")

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as in --set training.batch_size=32."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no table.")]


def told_in_a_sentence(command: Callable[P, R]) -> Callable[P, R]:
    """Tell a user's mistake in one sentence on standard error, exit code 2; bugs keep their traceback."""

    @functools.wraps(command)
    def wrapped(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            return command(*arguments, **options)
        except BrokenPipeError:
            sys.stderr.close()  # whoever read our output has left
            raise typer.Exit(1) from None
        except (MsfusionError, OSError) as error:
            sentence = " ".join(str(error).split()).rstrip(".")
            typer.echo(f"msfusion: {sentence}.", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            typer.echo(
                "msfusion: interrupted; the same command goes on from here (train, compare: with --resume).",
                err=True,
            )
            raise typer.Exit(130) from None

    return wrapped


def console_of_user() -> Console:
    """Where results are shown."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120  # a file or pipe has no width; tables should not be squeezed into 80 columns
    return console


def print_line(console: Console, text: object) -> None:
    """Print a path or a sentence just as it is: whole, without colours, brackets kept."""
    console.print(f"{text}", highlight=False, soft_wrap=True, markup=False)
