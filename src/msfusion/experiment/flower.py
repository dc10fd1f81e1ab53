"""A run as a Flower app: what its ServerApp and its ClientApp do. Any method but those that converse.

Both have the same configuration, which lies in the app. The server's run is that of `train`, with Flower as its engine:
the same run directory, the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from rich.console import Console

from msfusion.engines.flower.engine import FlowerEngine
from msfusion.engines.flower.nodes import Waiting
from msfusion.engines.flower.participant import Participant, Spare, respond
from msfusion.engines.grpc.packing import Agreement
from msfusion.engines.grpc.places import MOST_EXAMPLES
from msfusion.errors import ConfigError, MsfusionError, StreamError
from msfusion.experiment.agreement import agreement_of, prepared_for_network
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.own_data import OwnData, place_of
from msfusion.experiment.remote import remote_run
from msfusion.experiment.train import Watcher, train
from msfusion.experiment.watch import Lines
from msfusion.quoting import quoted

if TYPE_CHECKING:
    from flwr.serverapp import Grid

NUMBERS = ("participant", "partition-id")
"""The keys of a SuperNode's --node-config that say which participant it is; the first goes before the second."""


def serve(
    config: Config,
    path: Path,
    grid: Grid,
    waiting: Waiting | None = None,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Serve a whole run, leaving everything in the directory `path` as `train` does, and return the summary.

    A run that is there is continued from its last checkpoint. Raises what `train` raises, and StreamError where nobody
    comes, or somebody who does not fit.
    """
    engines: list[FlowerEngine] = []

    def listen(examples: Sequence[int | None], agreement: Agreement) -> FlowerEngine:
        back = RunDirectory(path).furthest_back(config.run.checkpoint_every)
        most = config.screening.max_examples or MOST_EXAMPLES
        engines.append(FlowerEngine(grid, examples, agreement, waiting, back + 1, most))
        return engines[0]

    config, preparing = remote_run(listen, config, path)
    summary = train(config, path, resume=True, watcher=watcher, preparing=preparing)
    for engine in engines:
        engine.say_over(config.rounds)
    return summary


def server_main(grid: Grid, context: Context, config: Path) -> None:
    """What a ServerApp does: the whole run of a configuration file, as its run config says.

    `out` is the run directory, from where the SuperLink was started; `patience` and `deadline` are those of `Waiting`.
    Raises what `serve` raises; Flower then tells the sentence as the status of its run.
    """
    say = _teller("msfusion")
    with _in_a_sentence(say):
        settings = load_config(config)
        told = {key: _setting(context.run_config, key) for key in ("patience", "deadline")}
        given = {key: float(value) for key, value in told.items() if value is not None}
        out = context.run_config.get("out")
        if not isinstance(out, str) or not out:
            raise ConfigError("the run config has no 'out': say where the run directory goes")
        console = Console(width=200, highlight=False, soft_wrap=True)
        serve(settings, Path(out), grid, Waiting(**given, on_event=say), Lines(console, "msfusion:"))
        say(f"the model and all figures are in {Path(out).resolve()}")


def answer(message: Message, context: Context, config: Path) -> Message:
    """What a ClientApp answers to a message of `server_main`. Raises nothing.

    The SuperNode's --node-config says which `participant` it is (or `partition-id`), where its own `data` is if not
    where data.own says, and in which folder to `keep` what its method has it keep, and a log of what has left it.
    """
    numbers = [str(context.node_config[key]) for key in NUMBERS if key in context.node_config]
    say = _teller(f"msfusion: participant {(numbers or ['?'])[0]}")

    def present() -> Participant:
        return participant_of(load_config(config), context.node_config)

    return respond(message, context.state, present, say)


def participant_of(config: Config, node: Mapping[str, Any]) -> Participant:
    """The participant that a SuperNode with this --node-config is. Raises MsfusionError.

    A StreamError, of a number that is missing or wrong, may be told to the server.
    """
    number = _number(config, node)
    folder, data = (_text(node, key) for key in ("keep", "data"))
    place, pinned = place_of(config, number, data), config.pinned()
    own = None if place is None else OwnData(pinned, number, place)
    prepared = prepared_for_network(pinned, None) if own is None else own.run([1] * config.participants.count)
    return Participant(
        number,
        prepared.data.participants[number],
        agreement_of(prepared) if own is None else own.agreement,
        (lambda _: prepared.method) if own is None else (lambda counts: own.run(counts).method),
        prepared.data.test,
        None if folder is None else Path(folder).expanduser(),
        config.run.threads,
    )


def _number(config: Config, node: Mapping[str, Any]) -> int:
    for key in NUMBERS:
        if key in node:
            number = node[key]
            if not isinstance(number, int) or isinstance(number, bool):
                raise StreamError(
                    f"{key} in its --node-config is {quoted(number)}: it must be a whole number"
                )
            if not 0 <= number < config.participants.count:
                most = config.participants.count - 1
                raise Spare(f"there is no participant {number}: they are 0 to {most} (participants.count)")
            return number
    raise StreamError(
        "its --node-config does not say which participant it is: start the SuperNode with --node-config "
        "'partition-id=0', and so on"
    )


def _text(node: Mapping[str, Any], key: str) -> str | None:
    value = node.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigError(
            f'{key} in the --node-config is {quoted(value)}: it must be a text, as in {key}="PATH"'
        )
    return value


def _setting(run_config: Mapping[str, Any], key: str) -> float | int | None:
    value = run_config.get(key)
    if value is not None and (not isinstance(value, float | int) or isinstance(value, bool)):
        raise ConfigError(f"{key} in the run config is {quoted(value)}: it must be a number of seconds")
    return value


def _teller(who: str) -> Callable[[str], None]:
    """Tells what happens in the log of the SuperNode or the SuperLink."""

    def say(text: str) -> None:
        print(f"{who}: {text}", flush=True)

    return say


@contextmanager
def _in_a_sentence(say: Callable[[str], None]) -> Iterator[None]:
    """Tell a user's mistake in one sentence, not in a traceback: this process ends with it."""
    try:
        yield
    except MsfusionError as error:
        say(str(error))
        sys.tracebacklimit = 0
        raise
