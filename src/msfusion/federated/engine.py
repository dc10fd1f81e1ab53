"""Who does the participants' work: what an engine needs of them, and the simplest: this process itself."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from msfusion.batch import Batch
from msfusion.errors import ConfigError, MsfusionError, PrivacyError, TrainingError
from msfusion.federated.messages import payload_bytes
from msfusion.federated.method import (
    Kind,
    Method,
    Recalibrating,
    Released,
    Reporting,
    Task,
    TrainsTogether,
    Update,
)
from msfusion.federated.privacy import check_dense, check_figures
from msfusion.imports import in_one_line, without_ending
from msfusion.width.groups import State

Job = Callable[[], Sequence[Task]]
"""Makes the tasks that are done at once, mostly one; called when somebody is about to take them up, so that tasks
do not pile up in memory.
"""

CPU = torch.device("cpu")

Made = TypeVar("Made")


@dataclass(frozen=True)
class Done:
    """A finished task: the update, the seconds that it took (of a job of several tasks an equal part), and the
    bytes that went down and up. Where the participant failed, `failure` says why, and the update is empty.
    """

    update: Update
    seconds: float
    bytes_down: int
    bytes_up: int
    failure: MsfusionError | None = None


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


def done(task: Task, answer: Update | MsfusionError, seconds: float) -> Done:
    """A finished task, from what the participant answered or why it could not."""
    down = payload_bytes(task.tensors)
    if isinstance(answer, MsfusionError):
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
) -> tuple[list[Released | MsfusionError], float]:
    """The work of the participants of one job, and the seconds that it took for each.

    They train on the device; what arrives and what is returned is on the CPU. `test` is the common test data.
    A participant that fails, whatever it raises, has the reason in place of an update: so has one whose update is
    malformed or holds what may not leave, and nothing of it is sent then.
    Raises TrainingError where somebody's function would end the program.
    """
    begin = time.perf_counter()
    own = [data[task.participant] for task in tasks]
    with without_ending(TrainingError):
        if kind == "measure":
            assert isinstance(method, Recalibrating)
            answers = _each(method, kind, method.measure, tasks, own)
        else:
            there = [_task_on(device, task) for task in tasks]
            own = [each.to(device) for each in own]
            answers = _train(method, there, own) if kind == "train" else _report(method, there, own, test)
    return answers, (time.perf_counter() - begin) / len(tasks)


def _attempt(task: Task, work: Callable[[], Made]) -> Made | MsfusionError:
    """What a participant's work makes, or why it failed: our own errors as they are, others in a sentence."""
    try:
        return work()
    except MsfusionError as error:
        return error
    except Exception as error:  # of one participant's data or memory, as likely as of the program
        traceback.clear_frames(error.__traceback__)  # in which the tensors of its training may be
        failure = TrainingError(
            f"participant {task.participant} failed in round {task.round_index} "
            f"({type(error).__name__}: {in_one_line(error)})"
        )
        failure.__cause__ = error
        return failure


def _released(method: Method, kind: Kind, task: Task, update: Update) -> Released:
    """The update as what may leave the participant, on the CPU. Raises PrivacyError."""
    source = f"participant {task.participant} in round {task.round_index}"
    if not isinstance(update, Update):
        raise PrivacyError(f"{source} would send a {type(update).__name__}: send an Update")
    check_dense(update.tensors, source)
    check_dense(update.memory, source, "keep")
    check_figures(update.examples, update.loss, source)
    shared = method.outbound(kind, task).select(_on(CPU, update.tensors), update.metadata, source)
    memory = _on(CPU, update.memory)
    # whose update it is, of which round, and how much it counts are the engine's to say
    return Released(
        Update(
            task.participant, task.round_index, shared, update.examples, update.loss, update.metadata, memory
        )
    )


def _each(
    method: Method,
    kind: Kind,
    work: Callable[[Task, Batch], Update],
    tasks: Sequence[Task],
    data: Sequence[Batch],
) -> list[Released | MsfusionError]:
    """One participant after the other."""

    def answer(task: Task, own: Batch) -> Released:
        return _released(method, kind, task, work(task, own))

    return [_attempt(task, partial(answer, task, own)) for task, own in zip(tasks, data, strict=True)]


def _train(method: Method, tasks: Sequence[Task], data: Sequence[Batch]) -> list[Released | MsfusionError]:
    if len(tasks) == 1:
        return _each(method, "train", method.train, tasks, data)
    assert isinstance(method, TrainsTogether)
    try:
        updates = method.train_together(tasks, data)
    except Exception as error:  # one of them: each by itself, to know which
        alone = _each(method, "train", method.train, tasks, data)
        if isinstance(error, TrainingError) or any(isinstance(each, MsfusionError) for each in alone):
            return alone
        raise  # nobody's, but of training them together
    return [
        _attempt(task, partial(_released, method, "train", task, update))
        for task, update in zip(tasks, updates, strict=True)
    ]


def _report(
    method: Method, tasks: Sequence[Task], data: Sequence[Batch], test: Batch | None
) -> list[Released | MsfusionError]:
    assert isinstance(method, Reporting)
    assert test is not None
    report, there = method.report, test.to(data[0].targets.device)
    return _each(method, "report", lambda task, own: report(task, own, there), tasks, data)


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
