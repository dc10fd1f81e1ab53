"""A run as a page of HTML: a file, or served while the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from msfusion.cli.common import console_of_user, print_line, told_in_a_sentence

pages = typer.Typer(rich_markup_mode=None)


@pages.command()
@told_in_a_sentence
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Directories of runs, or of comparisons.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page. Default: report.html in the first DIR.")
    ] = None,
) -> None:
    """Write the page of a run, or of several side by side. One HTML file, which needs no network."""
    from msfusion.experiment.page.write import write_report

    print_line(console_of_user(), write_report(runs, out))


@pages.command()
@told_in_a_sentence
def watch(
    run: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory of a run, begun or not, or a comparison.")
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Where the page is; 0 takes a free one.")
    ] = 8765,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Another than this machine's loopback: for all who reach it."),
    ] = "127.0.0.1",
) -> None:
    """Serve the page of a run while it goes on. The page in the browser keeps up by itself."""
    from msfusion.experiment.page.serving import serve_page

    serve_page(run, host, port, lambda address: typer.echo(f"{address} shows {run}; Ctrl-C ends it."))
