"""What the ServerApp of a deployed run does: the run is that of `train`, with Flower as its engine.

It leaves the same run directory, and the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context
from rich.console import Console

from msfusion.engines.flower.engine import FlowerEngine
from msfusion.engines.flower.nodes import Waiting
from msfusion.engines.grpc.packing import Agreement
from msfusion.errors import ConfigError, MsfusionError
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.remote import remote_run
from msfusion.experiment.train import Watcher, train
from msfusion.experiment.watch import Lines
from msfusion.quoting import quoted

if TYPE_CHECKING:
    from flwr.serverapp import Grid


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

    def listen(examples: Sequence[int | None], agreement: Agreement, **limits: int) -> FlowerEngine:
        engines.append(FlowerEngine(grid, examples, agreement, waiting, str(path.resolve()), **limits))
        return engines[0]

    with RunDirectory(path).locked():  # also while participants are waited for
        config, preparing = remote_run(listen, config, path)
        summary = train(config, path, resume=True, watcher=watcher, preparing=preparing, held=True)
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
        path = Path(out).expanduser()
        serve(settings, path, grid, Waiting(**given, on_event=say), Lines(console, "msfusion:"))
        say(f"the model and all figures are in {path.resolve()}")


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
