"""Any method over a network: a command for each of those who take part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
Certificates = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="The folder that `msfusion certificates` wrote for this machine."),
]
PlainText = Annotated[
    bool, typer.Option("--plain-text", help="No TLS and no token: on this one machine's loopback only.")
]
Patience = Annotated[
    float, typer.Option(metavar="SECONDS", help="How long to wait for somebody who is away.")
]


@network.command()
@told_in_a_sentence
def certificates(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where they go, or are.")],
    host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A name or address of the server; several times.")
    ] = None,
    participants: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How many participants there are.")
    ] = None,
    client_certificates: Annotated[
        bool,
        typer.Option(
            "--client-certificates",
            help="With --participants: a certificate for each of them too, which the server asks for.",
        ),
    ] = False,
    renew: Annotated[
        bool, typer.Option("--renew", help="Only a new certificate for the server: participants keep theirs.")
    ] = False,
    new_token: Annotated[
        int | None, typer.Option(min=0, metavar="P", help="Only another token for participant P.")
    ] = None,
    withdraw: Annotated[
        int | None,
        typer.Option(min=0, metavar="P", help="Only withdraw the token of participant P, at once."),
    ] = None,
) -> None:
    """Make the keys of a server and its participants.

    A private authority, a certificate for the server, and a token for each participant, in a folder for each
    machine; or renew or withdraw one of them.
    """
    from msfusion.engines.grpc import certificates as made

    wanted = [participants is not None, renew, new_token is not None, withdraw is not None]
    if sum(wanted) != 1 or (host and (new_token is not None or withdraw is not None)):
        raise ConfigError(
            "give --host and --participants to make certificates, or one of --renew, --new-token and --withdraw"
        )
    if client_certificates and participants is None:
        raise ConfigError("--client-certificates goes with --host and --participants")
    if participants is not None:
        made.make_certificates(out, host or (), participants, client_certificates)
        changed = [made.SERVER, *map(made.of_participant, range(participants)), made.AUTHORITY_FOLDER]
    elif renew:
        made.renew_certificate(out, host or ())
        changed = [made.SERVER]
    elif new_token is not None:
        made.renew_token(out, new_token)
        changed = [made.SERVER, made.of_participant(new_token)]
    else:
        assert withdraw is not None
        made.withdraw_token(out, withdraw)
        changed = [made.SERVER]
    _tell_where(out, changed)


MOST_TOLD = 20


def _tell_where(out: Path, folders: Sequence[str]) -> None:
    """Which folders are new or changed, and whom each is for."""
    from msfusion.engines.grpc.certificates import AUTHORITY_FOLDER, SERVER

    for_whom = {SERVER: "for the server", AUTHORITY_FOLDER: "to keep, for renewing the server's certificate"}
    console = console_of_user()
    for number, folder in enumerate(folders):
        if folder in for_whom or number <= MOST_TOLD:
            whom = for_whom.get(folder) or f"for {folder.replace('-', ' ')}"
            print_line(console, f"{whom}: {out / folder}")
        elif number == MOST_TOLD + 1:
            print_line(console, "and so on")


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
    begin_after: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="When to go on without those that have not come yet since a new run began. Default: never.",
            show_default=False,
        ),
    ] = math.inf,
    overrides: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Train with participants that join over a network.

    The run is that of `msfusion train`, and so is its directory.
    """
    from msfusion.engines.grpc.listening import Listening
    from msfusion.experiment.config import load_config
    from msfusion.experiment.kinds import advice_lines, kind_of
    from msfusion.experiment.network import serve as run
    from msfusion.experiment.report.usual import results_table
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
        begin_after=begin_after,
        on_listening=lambda where: say(f"listening on {where}"),
        on_event=say,
    )
    with Silent() if quiet else watcher(console) as watching:
        summary = run(settings, out, listening, watching)
    if not quiet:
        console.print(kind_of(summary["method"]).closing_table(summary))
        for line in advice_lines(summary):
            print_line(console, line)
        console.print(results_table(summary))
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
            "killed can go on, and a log of what has left it. Default: in memory, and no log.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Where its own data is: a folder, a file or module:function. Default: where data.own says.",
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
    connecting = Connecting(address, _access(certificates, plain_text, of_server=False), patience, say)
    say("loading the data and the model")
    rounds = run(settings, connecting, participant, out, data)
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
