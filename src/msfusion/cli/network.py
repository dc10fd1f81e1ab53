"""Any method over a network: a command for each of those who take part."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from msfusion.cli.common import Overrides, Quiet, console_of_user, print_line, told_in_a_sentence
from msfusion.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from msfusion.engines.grpc.access import Access

network = typer.Typer(rich_markup_mode=None)

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="TOML file, the same for the server and all participants.")
]
Address = Annotated[
    str, typer.Option(metavar="HOST:PORT", help="Of the server; for serve, 0.0.0.0:PORT is everywhere.")
]
Certificates = Annotated[Path | None, typer.Option(metavar="DIR", help="What `msfusion certificates` wrote.")]
PlainText = Annotated[
    bool, typer.Option("--plain-text", help="No TLS and no token: on this one machine's loopback only.")
]
Patience = Annotated[
    float, typer.Option(metavar="SECONDS", help="How long to wait for somebody who is away.")
]


@network.command()
@told_in_a_sentence
def certificates(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where they go.")],
    host: Annotated[
        list[str], typer.Option(metavar="NAME", help="A name or address of the server; several times.")
    ],
) -> None:
    """Make the keys of a server and its participants.

    A private authority, a certificate for the server, and a token.
    """
    from msfusion.engines.grpc.certificates import AUTHORITY, CERTIFICATE, KEY, TOKEN, make_certificates

    make_certificates(out, host)
    console = console_of_user()
    for who, names in (("the server", (CERTIFICATE, KEY, TOKEN)), ("each participant", (AUTHORITY, TOKEN))):
        text = f"for {who}: {', '.join(str(out / name) for name in names)}"
        print_line(console, text)


@network.command()
@told_in_a_sentence
def serve(
    config: ConfigFile,
    address: Address,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Run directory. A run that is there is continued.")
    ],
    certificates: Certificates = None,
    plain_text: PlainText = False,
    deadline: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="How long a participant may take for its part of a round (in split learning for a mini-batch).",
        ),
    ] = 3600.0,
    patience: Patience = 600.0,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Train with participants that join over a network.

    The run is that of `msfusion train`, and so is its directory.
    """
    from msfusion.engines.grpc.listening import Listening
    from msfusion.experiment.config import load_config
    from msfusion.experiment.kinds import kind_of
    from msfusion.experiment.network import serve as run
    from msfusion.experiment.train import Silent
    from msfusion.experiment.watch import watcher

    console = console_of_user()
    say = _teller(console, quiet)
    settings = load_config(config, overrides or ())
    settings.refuse_ignored()
    listening = Listening(
        address,
        _access(certificates, plain_text, of_server=True),
        deadline=deadline,
        patience=patience,
        on_listening=lambda where: say(f"listening on {where}"),
        on_event=say,
    )
    with Silent() if quiet else watcher(console) as watching:
        summary = run(settings, out, listening, watching)
    if not quiet:
        console.print(kind_of(summary["method"]).closing_table(summary))
    print_line(console, out)


@network.command()
@told_in_a_sentence
def join(
    config: ConfigFile,
    address: Address,
    participant: Annotated[int, typer.Option(min=0, metavar="P", help="Which participant this is, from 0.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where to keep what the method keeps on this machine between rounds, so that a participant that is "
            "killed can go on. Default: in memory.",
        ),
    ] = None,
    certificates: Certificates = None,
    plain_text: PlainText = False,
    patience: Patience = 600.0,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Take part with the data of one participant, which stay here."""
    from msfusion.engines.grpc.calling import Connecting
    from msfusion.experiment.config import load_config
    from msfusion.experiment.network import join as run

    say = _teller(console_of_user(), quiet, f"participant {participant}: ")
    settings = load_config(config, overrides or ())
    settings.refuse_ignored()
    access = _access(certificates, plain_text, of_server=False)
    rounds = run(settings, Connecting(address, access, patience, say), participant, out)
    say(f"has taken part in all {rounds} rounds")


@network.command(
    "split", hidden=True, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
@told_in_a_sentence
def renamed(command: Annotated[str, typer.Argument()] = "serve") -> None:
    """Say what these commands are called now; they had this name when only split learning had them."""
    raise ConfigError(f"'msfusion split {command}' is called 'msfusion {command}' now, with the same options")


def _access(certificates: Path | None, plain_text: bool, *, of_server: bool) -> Access:
    """What protects the connection. Raises ConfigError where neither or both were asked for."""
    from msfusion.engines.grpc.access import Access

    if plain_text and certificates is not None:
        raise ConfigError(
            "--plain-text sends no token over no TLS; leave out --certificates, or --plain-text"
        )
    if plain_text:
        return Access()
    if certificates is None:
        raise ConfigError(
            "--certificates is missing: make some with 'msfusion certificates', or try on one machine "
            "with --plain-text"
        )
    return Access.of_server(certificates) if of_server else Access.of_participant(certificates)


def _teller(console: Console, quiet: bool, who: str = "") -> Callable[[str], None]:
    """Tells what happens, and to whom, or not."""

    def say(text: str) -> None:
        if not quiet:
            print_line(console, f"{who}{text}")

    return say
