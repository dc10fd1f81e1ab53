"""A federation simulated on this machine by so many workers, and what a method makes of updates given by hand."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from msfusion.batch import Batch
from msfusion.engines.machine import on_this_machine
from msfusion.engines.processes import Processes
from msfusion.federated import rounds
from msfusion.federated.engine import Answer, Ask, Engine
from msfusion.federated.method import Kind, Method, Task, Update
from msfusion.federated.participation import RoundSettings
from msfusion.federated.results import RoundResult
from msfusion.width.groups import State

Job = Callable[[], Sequence[Task]]


def run_rounds(
    method: Method,
    data: Sequence[Batch],
    settings: RoundSettings,
    *,
    workers: int = 1,
    threads: int = 1,
    device: str = "cpu",
    **options: Any,
) -> Generator[RoundResult, None, None]:
    """The rounds, carried out by so many processes."""
    engine = on_this_machine(workers, threads, device)
    return rounds.run_rounds(method, data, settings, engine=engine, threads=threads, **options)


def answered(method: Method, state: State, updates: Iterable[Update]) -> Iterator[tuple[Task, Update]]:
    """Each update with the task that the method assigns for it, in this state."""
    for update in updates:
        yield method.assign(state, update.round_index, update.participant), update


def fuse_updates(method: Method, state: State, updates: Iterable[Update]) -> dict[str, Tensor]:
    """What the method makes of the state and of updates that answer what it assigns in this state."""
    return method.fuse(state, answered(method, state, updates))


class Opened:
    """An engine that is open, with its method."""

    def __init__(self, engine: Engine, method: Method) -> None:
        self.engine, self.method = engine, method

    def run(self, kind: Kind, jobs: Sequence[Job]) -> Iterator[Answer]:
        """Have all done."""
        return self.engine.run(self.method, [Ask(kind, job) for job in jobs])


@contextmanager
def opened(engine: Engine, method: Method, data: Sequence[Batch]) -> Iterator[Opened]:
    """The engine, open inside; of processes all are there already."""
    engine.open(data)
    try:
        if isinstance(engine, Processes):
            list(engine.run(method, []))  # starts them
        yield Opened(engine, method)
    finally:
        engine.close()
