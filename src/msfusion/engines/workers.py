"""Who does the participants' work: what an engine needs of them, and the simplest: this process itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from msfusion.batch import Batch
from msfusion.engines.messages import payload_bytes
from msfusion.errors import ConfigError, TrainingError
from msfusion.imports import without_ending
from msfusion.methods.base import (
    Kind,
    Method,
    Recalibrating,
    Released,
    Reporting,
    Task,
    TrainsTogether,
    Update,
)
from msfusion.methods.outbound import check_figures
from msfusion.width.groups import State

Job = Callable[[], Sequence[Task]]
"""Makes the tasks that are done at once, mostly one; called when somebody is about to take them up, so that tasks
do not pile up in memory.
"""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Done:
    """A finished task: the update, the seconds that it took (of a job of several tasks an equal part), and the
    bytes that went down and up. Where the participant's training came to no end, `failure` says why, and the update
    is empty.
    """

    update: Update
    seconds: float
    bytes_down: int
    bytes_up: int
    failure: TrainingError | None = None


@runtime_checkable
class Workers(Protocol):
    """Whoever does the participants' work."""

    def run(self, kind: Kind, jobs: Sequence[Job]) -> Generator[Done, None, None]:
        """Do all jobs, taken up in this order, and hand on what is done as it arrives."""

    def close(self) -> None:
        """Let go of all processes."""


class InProcess:
    """The calling process as the only worker."""

    def __init__(
        self, method: Method, data: Sequence[Batch], device: torch.device = CPU, test: Batch | None = None
    ) -> None:
        self._method, self._data, self._device, self._test = method, data, device, test

    def run(self, kind: Kind, jobs: Sequence[Job]) -> Generator[Done, None, None]:
        """One after the other."""
        for job in jobs:
            tasks = job()
            answers, seconds = perform(self._method, kind, tasks, self._data, self._device, self._test)
            for task, answer in zip(tasks, answers, strict=True):
                yield done(task, answer, seconds)

    def close(self) -> None:
        """Nothing to let go of."""


def done(task: Task, answer: Update | TrainingError, seconds: float) -> Done:
    """A finished task, from what the participant answered or why it could not."""
    down = payload_bytes(task.tensors)
    if isinstance(answer, TrainingError):
        empty = Update(task.participant, task.round_index, {}, 0, math.nan)
        return Done(empty, seconds, down, 0, answer)
    return Done(answer, seconds, down, payload_bytes(answer.tensors))


def perform(
    method: Method,
    kind: Kind,
    tasks: Sequence[Task],
    data: Sequence[Batch],
    device: torch.device = CPU,
    test: Batch | None = None,
) -> tuple[list[Released | TrainingError], float]:
    """The work of the participants of one job, and the seconds that it took for each.

    They train on the device; what arrives and what is returned is on the CPU. `test` is the common test data.
    A participant whose training comes to no end has the reason in place of an update.
    Raises PrivacyError where an update holds what may not leave: nothing of the job is sent then; TrainingError where
    somebody's function would end the program.
    """
    begin = time.perf_counter()
    own = [data[task.participant] for task in tasks]
    updates: Sequence[Update | TrainingError]
    with without_ending(TrainingError):
        if kind == "measure":
            assert isinstance(method, Recalibrating)
            updates = [method.measure(task, mine) for task, mine in zip(tasks, own, strict=True)]
        else:
            there = [_task_on(device, task) for task in tasks]
            own = [each.to(device) for each in own]
            updates = _train(method, there, own) if kind == "train" else _report(method, there, own, test)
    released = [
        update if isinstance(update, TrainingError) else _released(method, kind, task, update)
        for task, update in zip(tasks, updates, strict=True)
    ]
    return released, (time.perf_counter() - begin) / len(tasks)


def _released(method: Method, kind: Kind, task: Task, update: Update) -> Released:
    """The update as what may leave the participant, on the CPU. Raises PrivacyError."""
    source = f"participant {task.participant} in round {task.round_index}"
    check_figures(update.examples, update.loss, source)
    shared = method.outbound(kind, task).select(_on(CPU, update.tensors), update.metadata, source)
    memory = _on(CPU, update.memory)
    # whose update it is, of which round, and how much it counts are the engine's to say
    return Released(
        Update(
            task.participant, task.round_index, shared, update.examples, update.loss, update.metadata, memory
        )
    )


def _train(method: Method, tasks: Sequence[Task], data: Sequence[Batch]) -> Sequence[Update | TrainingError]:
    if len(tasks) > 1:
        assert isinstance(method, TrainsTogether)
        with suppress(TrainingError):  # one of them: each by itself, to know which
            return method.train_together(tasks, data)
    return [_trained(method, task, own) for task, own in zip(tasks, data, strict=True)]


def _trained(method: Method, task: Task, data: Batch) -> Update | TrainingError:
    try:
        return method.train(task, data)
    except TrainingError as error:
        return error


def _report(method: Method, tasks: Sequence[Task], data: Sequence[Batch], test: Batch | None) -> list[Update]:
    assert isinstance(method, Reporting)
    assert test is not None
    return [
        method.report(task, own, test.to(own.targets.device)) for task, own in zip(tasks, data, strict=True)
    ]


def _task_on(device: torch.device, task: Task) -> Task:
    return replace(task, tensors=_on(device, task.tensors), memory=_on(device, task.memory))


def _on(device: torch.device, tensors: State) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def check_execution(method: Method, workers: int, together: int, device: str) -> None:
    """Raise ConfigError where a method cannot be carried out in this way, on this machine."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device is {device!r}: it must be one of cpu, cuda")
    if device == "cuda" and workers > 1:
        raise ConfigError(
            f"workers is {workers}, but one process fills the GPU: set it to 1, or device to cpu"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but PyTorch finds no GPU on this machine: set it to cpu")
    if together > 1:
        if not isinstance(method, TrainsTogether):
            raise ConfigError(f"{method.name} cannot train several participants at once: set together to 1")
        method.check_together()


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
