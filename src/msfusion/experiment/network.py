"""A run whose participants are on machines of their own: the server, and a participant. Any method, any codec.

Both sides have the same configuration. The server's run is that of `train`, with the network as its engine: the same
run directory, the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from msfusion.engines.grpc.calling import Connecting
from msfusion.engines.grpc.listening import Listening
from msfusion.engines.grpc.network import Network
from msfusion.engines.grpc.packing import Agreement
from msfusion.engines.grpc.participant import take_part
from msfusion.errors import ConfigError
from msfusion.experiment.config import Config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.lock import locked
from msfusion.experiment.remote import part_of, remote_run
from msfusion.experiment.train import Watcher, train
from msfusion.files import allow_many_files, digest_of_json


def serve(
    config: Config,
    path: Path,
    listening: Listening,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Serve a whole run, leaving everything in the directory `path` as `train` does, and return the summary.

    A run that is there is continued from its last checkpoint, and everybody has the server's patience anew; of a
    finished one, participants that have not heard of its end are told. Raises what `train` raises (RunDirectoryError
    where another server waits for participants of a run in that directory, too), and StreamError where the address
    cannot be had, or nobody comes.

    Where participants have data of their own (data.own), a run begins when all have come: only they know how many
    examples they have. From then on the run's own configuration says it.
    """
    allow_many_files()
    begun, networks = bool(RunDirectory(path).read_metrics()), list[Network]()
    begin_after = listening.patience if begun else listening.begin_after
    listening = replace(listening, scratch=path, begin_after=begin_after)
    with ExitStack() as stack:
        stack.enter_context(RunDirectory(path).locked())  # also while participants are waited for

        def listen(examples: Sequence[int | None], agreement: Agreement, **limits: int) -> Network:
            networks.append(stack.enter_context(Network(listening, examples, agreement, **limits)))
            return networks[0]

        config, preparing = remote_run(listen, config, path)
        summary = train(config, path, resume=True, watcher=watcher, preparing=preparing, held=True)
        if not networks:
            preparing(config.pinned(), None)
        networks[0].say_over(config.rounds)
    return summary


def join(
    config: Config,
    connecting: Connecting,
    participant: int,
    folder: Path | None = None,
    data: str | None = None,
) -> int:
    """Take part in all rounds with the data of one participant; how many there were.

    What the method has it keep between rounds goes to a folder of its own in `folder`, so several participants and runs
    may be given the same; beside it a log says what has left this participant. `data` is where its own data is, if not
    where data.own says. Raises ConfigError where there is no such participant, or no data of its own,
    RunDirectoryError where another process is this participant, and what `take_part` raises.
    """
    count = config.participants.count
    if not 0 <= participant < count:
        raise ConfigError(
            f"there is no participant {participant}: they are 0 to {count - 1} (participants.count)"
        )
    part, log = part_of(config, participant, data), None
    if folder is not None:
        folder /= f"participant-{participant}-{digest_of_json(part.agreement)[:8]}"
        log = folder.with_name(f"{folder.name}.sent.jsonl")
    with locked(folder) if folder is not None else nullcontext():
        rounds = take_part(
            part.method,
            part.data,
            connecting,
            participant=participant,
            agreement=part.agreement,
            test=part.test,
            folder=folder,
            threads=config.run.threads,
            log=log,
        )
    if folder is not None:
        with suppress(OSError):
            folder.rmdir()  # a process that was killed may have made it
    return rounds
