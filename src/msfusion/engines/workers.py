"""Who does the participants' work: what an engine needs of them, and the simplest: this process itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from msfusion.batch import Batch
from msfusion.engines.messages import Kind, payload_bytes
from msfusion.methods.base import Method, Recalibrating, Task, Update

Job = Callable[[], Task]
"""Makes a task; called when somebody is about to take it up, so that tasks do not pile up in memory."""


@dataclass(frozen=True)
class Done:
    """A finished task: the update, the seconds that it took, and the bytes that went down and up."""

    update: Update
    seconds: float
    bytes_down: int
    bytes_up: int


@runtime_checkable
class Workers(Protocol):
    """Whoever does the participants' work."""

    def run(self, kind: Kind, jobs: Sequence[Job]) -> Generator[Done, None, None]:
        """Do all jobs, taken up in this order, and hand on what is done as it arrives."""

    def close(self) -> None:
        """Let go of all processes."""


class InProcess:
    """The calling process as the only worker."""

    def __init__(self, method: Method, data: Sequence[Batch]) -> None:
        self._method, self._data = method, data

    def run(self, kind: Kind, jobs: Sequence[Job]) -> Generator[Done, None, None]:
        """One after the other."""
        for job in jobs:
            task = job()
            update, seconds = perform(self._method, kind, task, self._data)
            yield Done(update, seconds, payload_bytes(task.tensors), payload_bytes(update.tensors))

    def close(self) -> None:
        """Nothing to let go of."""


def perform(method: Method, kind: Kind, task: Task, data: Sequence[Batch]) -> tuple[Update, float]:
    """A participant's work, and the seconds it took."""
    begin = time.perf_counter()
    own = data[task.participant]
    if kind == "train":
        update = method.train(task, own)
    else:
        assert isinstance(method, Recalibrating)
        update = method.measure(task, own)
    return update, time.perf_counter() - begin


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """PyTorch's threads in this process, put back afterwards."""
    before = torch.get_num_threads()
    if before != threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if before != threads:
            torch.set_num_threads(before)
