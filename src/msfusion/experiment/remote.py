"""What runs have in common whose participants are on machines of their own, whatever carries the messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from msfusion.batch import Batch
from msfusion.engines.grpc.packing import Agreement
from msfusion.engines.grpc.places import MOST_EXAMPLES
from msfusion.experiment.agreement import Run, agreement_of, prepared_for_network
from msfusion.experiment.config import Config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.own_data import OwnData, counts_in, place_of
from msfusion.experiment.setup import Parts
from msfusion.experiment.train import refuse_change
from msfusion.federated.engine import Engine
from msfusion.federated.method import Method


@runtime_checkable
class Remote(Protocol):
    """An engine whose participants come from elsewhere."""

    def examples_of_all(self) -> list[int]:
        """How many examples each participant has, once all have come. Raises StreamError where one does not."""


@runtime_checkable
class Listen(Protocol):
    """Makes the engine for participants with so many examples each, None where only they know."""

    def __call__(
        self, examples: Sequence[int | None], agreement: Agreement, *, rounds_kept: int, most_examples: int
    ) -> Engine:
        """`rounds_kept` is how many rounds participants have to keep what they go on from, `most_examples` the most
        that one of them may say that it has.
        """


Made = Callable[[Sequence[int | None], Agreement], Engine]
"""The same, where the rest is known."""

Preparing = Callable[[Config, Parts | None], Run]
"""Makes the run of a configuration, with its engine."""


def remote_run(listen: Listen, config: Config, path: Path) -> tuple[Config, Preparing]:
    """The configuration of a run in the directory `path`, and who makes the run of it: what `train` is called with.

    Where participants have data of their own (data.own), all have come when this returns: only they know how many
    examples they have. From then on the run's own configuration says it. Raises ConfigError, RunDirectoryError, and
    StreamError where somebody does not come.
    """

    def made(examples: Sequence[int | None], agreement: Agreement) -> Engine:
        back = RunDirectory(path).furthest_back(config.run.checkpoint_every)
        most = config.screening.max_examples or MOST_EXAMPLES
        return listen(examples, agreement, rounds_kept=back + 1, most_examples=most)

    if config.data.own is None:
        return config, partial(_shared_out, made)
    return _of_their_own(made, config, path)


def _shared_out(listen: Made, config: Config, parts: Parts | None) -> Run:
    """The run where everybody's part of the same data is known on all sides."""
    prepared = prepared_for_network(config, parts)
    prepared.engine = listen([len(own) for own in prepared.data.participants], agreement_of(prepared))
    return prepared


def _of_their_own(listen: Made, config: Config, path: Path) -> tuple[Config, Preparing]:
    """The configuration and the run where participants say how many examples they have, before there is a run."""
    own, known = OwnData(config.pinned()), counts_in(path)
    if known is None:
        RunDirectory.check_free(path)
    else:
        refuse_change(RunDirectory(path), config.changed({"data.own": known}).pinned())
    engine = listen(known or [None] * config.participants.count, own.agreement)
    assert isinstance(engine, Remote)
    counts = engine.examples_of_all()

    def preparing(_: Config, __: Parts | None) -> Run:
        prepared = own.run(counts)
        prepared.engine = engine
        return prepared

    return config.changed({"data.own": counts}), preparing


@dataclass(frozen=True)
class Part:
    """What a participant of such a run has on its machine, and what it agrees with the server on.

    `method` is made of how many examples everybody has, where participants have data of their own.
    """

    data: Batch
    test: Batch
    agreement: Agreement
    method: Method | Callable[[Sequence[int]], Method]


def part_of(config: Config, participant: int, data: str | None) -> Part:
    """The part of a participant, whose own data is at `data` if not where data.own says. Raises MsfusionError."""
    place, pinned = place_of(config, participant, data), config.pinned()
    if place is None:
        prepared = prepared_for_network(pinned, None)
        agreement, method = agreement_of(prepared), prepared.method
        return Part(prepared.data.participants[participant], prepared.data.test, agreement, method)
    own = OwnData(pinned, participant, place)
    alone = own.run([1] * config.participants.count).data
    return Part(
        alone.participants[participant], alone.test, own.agreement, lambda counts: own.run(counts).method
    )
