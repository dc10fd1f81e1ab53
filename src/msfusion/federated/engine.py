"""The contract of engines, the simplest of them (this process itself), and what is done where a participant is."""

from __future__ import annotations

import math
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from msfusion.batch import Batch
from msfusion.errors import ConfigError, MsfusionError, PrivacyError, TrainingError
from msfusion.federated.messages import payload_bytes
from msfusion.federated.method import Kind, Method, Released, Task, Update
from msfusion.federated.privacy import check_dense, check_figures
from msfusion.imports import in_one_line, without_ending
from msfusion.registry import Registry
from msfusion.width.groups import State

CPU = torch.device("cpu")

Made = TypeVar("Made")


@dataclass(frozen=True)
class Ask:
    """What is asked of participants at once, mostly of one: what they are to do, and the tasks to do it with.

    `tasks` makes them. An engine calls it when somebody is about to take them up, so that tasks do not pile up in
    memory.
    """

    kind: Kind
    tasks: Callable[[], Sequence[Task]]


@dataclass(frozen=True)
class Answer:
    """What came back for a task: the update, the seconds that it took (of several tasks at once an equal part), and the
    bytes that went down and up. Where the participant failed, `failure` says why, and the update is empty.
    """

    update: Update
    seconds: float
    bytes_down: int
    bytes_up: int
    failure: MsfusionError | None = None


class Engine(ABC):
    """Whoever carries tasks to the participants and brings back what they answer. It knows no method.

    An engine of one's own has to have `run`. Where participants are elsewhere, with their data, `perform` is what is
    called there; where they are simulated on this machine, `open` hands over what they have.
    """

    def open(self, data: Sequence[Batch], test: Batch | None = None) -> None:  # noqa: B027  # few need it
        """Before the first `run`: each simulated participant's examples, and the common test data.

        An engine whose participants have data of their own has no need of it.
        """

    @abstractmethod
    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        """Have all asks done, taken up in this order; hand on what came back as it arrives, in any order.

        The method is the same at every call until `close`. What a participant raises is its answer's `failure`. What is
        nobody's fault alone, such as a worker process that dies, is raised here.
        """

    def close(self) -> None:  # noqa: B027  # few need it
        """Let go of all processes and connections. Afterwards the engine may be opened again."""


ENGINES: Registry[Callable[[], Engine]] = Registry("engine", "run.engine")
"""What makes an engine, by name; `msfusion.engine` adds one."""


def engine(name: str) -> Callable[[Any], Any]:
    """A decorator that registers an engine's class, or a function that makes one. Raises ConfigError."""
    return ENGINES.add(name)


def engine_named(name: str) -> Engine:
    """The engine of that name, or of `module:Class`. Raises ConfigError where there is none, or it is no engine."""
    made = ENGINES[name]()
    if not isinstance(made, Engine):
        raise ConfigError(f"run.engine = '{name}' makes a {type(made).__name__}, which is no msfusion.Engine")
    return made


class InProcess(Engine):
    """The calling process does everybody's work, one after the other, on the CPU or on one GPU ("cuda").

    Raises ConfigError for a device that this machine does not have.
    """

    def __init__(self, device: str = "cpu") -> None:
        if device not in ("cpu", "cuda"):
            raise ConfigError(f"device is {device!r}: it must be one of cpu, cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device is 'cuda', but PyTorch finds no GPU on this machine: set it to cpu")
        self._device = torch.device(device)
        self._data: Sequence[Batch] = ()
        self._test: Batch | None = None

    def open(self, data: Sequence[Batch], test: Batch | None = None) -> None:
        """Keep them."""
        self._data, self._test = data, test

    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        """One after the other."""
        for ask in asks:
            tasks = ask.tasks()
            answers, seconds = perform(method, ask.kind, tasks, self._data, self._device, self._test)
            for task, each in zip(tasks, answers, strict=True):
                yield answer_to(task, each, seconds)


def answer_to(task: Task, answer: Update | MsfusionError, seconds: float) -> Answer:
    """The answer to a task, from what the participant made of it or why it could not."""
    down = payload_bytes(task.tensors)
    if isinstance(answer, MsfusionError):
        empty = Update(task.participant, task.round_index, {}, 0, math.nan)
        return Answer(empty, seconds, down, 0, answer)
    return Answer(answer, seconds, down, payload_bytes(answer.tensors))


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
    assert test is not None
    report, there = method.report, test.to(data[0].targets.device)
    return _each(method, "report", lambda task, own: report(task, own, there), tasks, data)


def _task_on(device: torch.device, task: Task) -> Task:
    return replace(task, tensors=_on(device, task.tensors), memory=_on(device, task.memory))


def _on(device: torch.device, tensors: State) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


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
