"""What runs have in common whose participants are on machines of their own, whatever carries the messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

from msfusion.engines.grpc.packing import Agreement
from msfusion.experiment.agreement import Run, agreement_of, prepared_for_network
from msfusion.experiment.config import Config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.own_data import OwnData, counts_in
from msfusion.experiment.setup import Parts
from msfusion.experiment.train import refuse_change
from msfusion.federated.engine import Engine


@runtime_checkable
class Remote(Protocol):
    """An engine whose participants come from elsewhere."""

    def examples_of_all(self) -> list[int]:
        """How many examples each participant has, once all have come. Raises StreamError where one does not."""


Listen = Callable[[Sequence[int | None], Agreement], Engine]
"""Makes the engine for participants with so many examples each, None where only they know."""

Preparing = Callable[[Config, Parts | None], Run]
"""Makes the run of a configuration, with its engine."""


def remote_run(listen: Listen, config: Config, path: Path) -> tuple[Config, Preparing]:
    """The configuration of a run in the directory `path`, and who makes the run of it: what `train` is called with.

    Where participants have data of their own (data.own), all have come when this returns: only they know how many
    examples they have. From then on the run's own configuration says it. Raises ConfigError, RunDirectoryError, and
    StreamError where somebody does not come.
    """
    if config.data.own is None:
        return config, partial(_shared_out, listen)
    return _of_their_own(listen, config, path)


def _shared_out(listen: Listen, config: Config, parts: Parts | None) -> Run:
    """The run where everybody's part of the same data is known on all sides."""
    prepared = prepared_for_network(config, parts)
    prepared.engine = listen([len(own) for own in prepared.data.participants], agreement_of(prepared))
    return prepared


def _of_their_own(listen: Listen, config: Config, path: Path) -> tuple[Config, Preparing]:
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
