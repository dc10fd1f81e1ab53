"""A run for somebody else's framework: a command for each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msfusion.cli.common import Overrides, console_of_user, print_line, told_in_a_sentence
from msfusion.extras import needing

deploy = typer.Typer(
    rich_markup_mode=None,
    name="deploy",
    help="Write a run as an app of another framework.",
    no_args_is_help=True,
)


@deploy.callback()
def frameworks() -> None:
    """Write a run as an app of another framework."""


@deploy.command()
@told_in_a_sentence
def flower(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the app goes: a new folder.")],
    overrides: Overrides = None,
) -> None:
    """Write a Flower app that carries out the run; its README.md says how to start it."""
    from msfusion.experiment.config import load_config

    settings = load_config(config, overrides or ())
    settings.refuse_ignored()
    with needing("flower", "a Flower app"):
        from msfusion.experiment.flower.deploy import app_name, write_app
    write_app(settings, app_name(config.stem), out)
    console = console_of_user()
    for path in (out, out / "README.md"):
        print_line(console, path)
