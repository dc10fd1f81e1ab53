"""A run whose participants are on machines of their own: the server, and a participant. Any method, any codec.

Both sides have the same configuration. The server's run is that of `train`, with the network as its engine: the same
run directory, the same numbers.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msfusion
from msfusion.engines.grpc.calling import Connecting
from msfusion.engines.grpc.listening import Listening
from msfusion.engines.grpc.network import Network
from msfusion.engines.grpc.packing import Agreement, Scalar
from msfusion.engines.grpc.participant import take_part
from msfusion.errors import ConfigError
from msfusion.experiment.config import Config
from msfusion.experiment.config.keys import flattened
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.grow import GrowRun
from msfusion.experiment.kinds import prepare
from msfusion.experiment.lock import locked
from msfusion.experiment.setup import Parts
from msfusion.experiment.slices import SlicesRun
from msfusion.experiment.split import SplitRun
from msfusion.experiment.train import Watcher, train
from msfusion.files import allow_many_files, digest_of_json

Run = SlicesRun | GrowRun | SplitRun

LONGEST_SHOWN = 60
"""The most letters of a setting that the other side is shown."""


def serve(
    config: Config,
    path: Path,
    listening: Listening,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Serve a whole run, leaving everything in the directory `path` as `train` does, and return the summary.

    A run that is there is continued from its last checkpoint, and everybody has the server's patience anew; of a
    finished one, participants that have not heard of its end are told. Raises what `train` raises, and StreamError
    where the address cannot be had, or nobody comes.
    """
    allow_many_files()
    begun, networks = bool(RunDirectory(path).read_metrics()), list[Network]()
    begin_after = listening.patience if begun else listening.begin_after
    listening = replace(listening, scratch=path, begin_after=begin_after)
    with ExitStack() as stack:

        def preparing(settings: Config, parts: Parts | None) -> Run:
            prepared = _prepared(settings, parts)
            examples = [len(own) for own in prepared.data.participants]
            back = RunDirectory(path).furthest_back(settings.run.checkpoint_every)
            network = Network(listening, examples, agreement_of(prepared), rounds_kept=back + 1)
            networks.append(stack.enter_context(network))
            prepared.engine = network
            return prepared

        summary = train(config, path, resume=True, watcher=watcher, preparing=preparing)
        if not networks:
            preparing(config.pinned(), None)
        for network in networks:
            network.say_over(config.rounds)
    return summary


def join(
    config: Config,
    connecting: Connecting,
    participant: int,
    folder: Path | None = None,
) -> int:
    """Take part in all rounds with the data of one participant; how many there were.

    What the method has it keep between rounds goes to a folder of its own in `folder`, so several participants and runs
    may be given the same; beside it a log says what has left this participant. Raises ConfigError where there is no
    such participant, RunDirectoryError where another process is this participant, and what `take_part` raises.
    """
    count = config.participants.count
    if not 0 <= participant < count:
        raise ConfigError(
            f"there is no participant {participant}: they are 0 to {count - 1} (participants.count)"
        )
    prepared = _prepared(config.pinned(), None)
    agreement = agreement_of(prepared)
    log = None
    if folder is not None:
        folder /= f"participant-{participant}-{digest_of_json(agreement)[:8]}"
        log = folder.with_name(f"{folder.name}.sent.jsonl")
    with locked(folder) if folder is not None else nullcontext():
        rounds = take_part(
            prepared.method,
            prepared.data.participants[participant],
            connecting,
            participant=participant,
            agreement=agreement,
            test=prepared.data.test,
            folder=folder,
            threads=config.run.threads,
            log=log,
        )
    if folder is not None:
        with suppress(OSError):
            folder.rmdir()  # a process that was killed may have made it
    return rounds


def _prepared(config: Config, parts: Parts | None) -> Run:
    """The run as it is in one process. Raises ConfigError where an engine was chosen, or several train at once."""
    run = config.run
    if run.engine is not None or run.together > 1:
        key = "together" if run.engine is None else "engine"
        raise ConfigError(f"run.{key} is for participants on one machine: leave it out over a network")
    prepared = prepare(config, parts)
    assert isinstance(prepared, Run)
    return prepared


def agreement_of(run: Run) -> Agreement:
    """Everything that decides the numbers, by name: version, configuration, data and model.

    Where the data lies may differ from machine to machine; what it holds may not.
    """
    decides = {
        f"setting {key}": _told(value)
        for key, value in flattened(run.config.deciding()).items()
        if key != "data.source"
    }
    data = {f"data ({part})": digest for part, digest in run.data.digests.items()}
    return {
        "version of msfusion": msfusion.__version__,
        **decides,
        **data,
        "model": run.model_digest,
    }


def _told(value: Any) -> Scalar:
    """A setting as it is compared and, where it differs, shown: of a long one its beginning, and a digest."""
    if isinstance(value, bool | float):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    text = value if isinstance(value, str) else repr(value)
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[:LONGEST_SHOWN]}... (digest {digest_of_json(text)[:16]})"
