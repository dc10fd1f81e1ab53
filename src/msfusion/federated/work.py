"""What is done where a participant is: its work, alone or in a conversation, and what of it may leave."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from msfusion.batch import Batch
from msfusion.errors import ConfigError, MsfusionError, PrivacyError, TrainingError
from msfusion.federated.conversation import Request, Response
from msfusion.federated.method import Kind, Method, Released, Task, Training, Update
from msfusion.federated.privacy import check_dense, check_figures
from msfusion.imports import in_one_line, without_ending
from msfusion.width.groups import State

CPU = torch.device("cpu")

Made = TypeVar("Made")


def perform(
    method: Method,
    kind: Kind,
    tasks: Sequence[Task],
    data: Sequence[Batch],
    device: torch.device = CPU,
    test: Batch | None = None,
    ask_server: Callable[[Request], Response] | None = None,
) -> tuple[list[Released | MsfusionError], float]:
    """The work of the participants of one job, and the seconds that it took for each.

    They train on the device; what arrives and what is returned is on the CPU. `test` is the common test data.
    A participant that fails, whatever it raises, has the reason in place of an update: so has one whose update is
    malformed or holds what may not leave, and nothing of it is sent then. `ask_server` carries a request to the server
    and waits for the response; what it raises is the participant's failure.
    Raises TrainingError where somebody's function would end the program.
    """
    begin = time.perf_counter()
    own = [data[task.participant] for task in tasks]
    with without_ending(TrainingError):
        if kind == "measure":
            answers = _each(method, kind, method.measure, tasks, own)
        elif kind == "train":
            answers = _train(method, _Training(device, ask_server), tasks, own)
        else:
            answers = _report(method, device, tasks, own, test)
    return answers, (time.perf_counter() - begin) / len(tasks)


def _attempt(task: Task, work: Callable[[], Made]) -> Made | MsfusionError:
    """What a participant's work makes, or why it failed."""
    try:
        return work()
    except Exception as error:
        return _failure(task, error)


def _failure(task: Task, error: Exception) -> MsfusionError:
    """Why a participant's work failed: our own errors as they are, others in a sentence.

    Others are of one participant's data or memory, as likely as of the program.
    """
    if isinstance(error, MsfusionError):
        return error
    traceback.clear_frames(error.__traceback__)  # in which the tensors of its training may be
    failure = TrainingError(
        f"participant {task.participant} failed in round {task.round_index + 1} "
        f"({type(error).__name__}: {in_one_line(error)})"
    )
    failure.__cause__ = error
    return failure


def _source(task: Task) -> str:
    return f"participant {task.participant} in round {task.round_index + 1}"


def _released(method: Method, kind: Kind, task: Task, update: object) -> Released:
    """The update as what may leave the participant, on the CPU. Raises PrivacyError."""
    source = _source(task)
    if not isinstance(update, Update):
        raise PrivacyError(f"{source} would send a {type(update).__name__}: send an Update")
    check_dense(update.tensors, source)
    check_dense(update.memory, source, "keep")
    check_figures(update.examples, update.loss, source)
    shared = method.outbound(kind, task).select(_on(CPU, update.tensors), update.metadata, source)
    memory = _on(CPU, update.memory)
    # whose update it is, of which round, and how much it counts are the engine's to say
    made = Update(
        task.participant, task.round_index, shared, update.examples, update.loss, update.metadata, memory
    )
    small = method.compression
    if small is None or kind != "train":
        return Released(made)
    coded = small.coded(task, made)
    outbound = small.outbound(task, method.outbound(kind, task))
    sent = outbound.select(coded.tensors, coded.metadata, source)
    return Released(replace(coded, tensors=sent, memory=_on(CPU, coded.memory)))


def _received(method: Method, task: Task) -> Task:
    """A task of training as it can be read from what was sent, on the CPU; its memory is all that is kept."""
    return task if method.compression is None else method.compression.received(task)


def _plain(method: Method, task: Task) -> Task:
    """A task as the method knows it."""
    return task if method.compression is None else method.compression.plain(task)


def _each(
    method: Method,
    kind: Kind,
    work: Callable[[Task, Batch], Update | Training],
    tasks: Sequence[Task],
    data: Sequence[Batch],
) -> list[Released | MsfusionError]:
    """One participant after the other."""

    def answer(task: Task, own: Batch) -> Released:
        if kind == "train":
            task = _received(method, task)
        return _released(method, kind, task, work(_plain(method, task), own))

    return [_attempt(task, partial(answer, task, own)) for task, own in zip(tasks, data, strict=True)]


@dataclass(frozen=True)
class _Training:
    """Where participants train, and who carries what they ask."""

    device: torch.device
    ask_server: Callable[[Request], Response] | None

    def alone(self, method: Method, task: Task, data: Batch) -> Update:
        """One of them trains by itself."""
        return _trained(method, self.ask_server, _task_on(self.device, task), data.to(self.device))

    def together(
        self, method: Method, tasks: Sequence[Task], data: Sequence[Batch]
    ) -> list[Released | MsfusionError]:
        """Several train at once; what the method raises is nobody's in particular."""
        received = [_received(method, task) for task in tasks]
        there = [_task_on(self.device, _plain(method, task)) for task in received]
        updates = method.train_together(there, [own.to(self.device) for own in data])
        return [
            _attempt(task, partial(_released, method, "train", task, update))
            for task, update in zip(received, updates, strict=True)
        ]


def _train(
    method: Method, training: _Training, tasks: Sequence[Task], data: Sequence[Batch]
) -> list[Released | MsfusionError]:
    train = partial(training.alone, method)
    if len(tasks) == 1:
        return _each(method, "train", train, tasks, data)
    try:
        return training.together(method, tasks, data)
    except Exception as error:  # one of them: each by itself, to know which
        alone = _each(method, "train", train, tasks, data)
        if isinstance(error, TrainingError) or any(isinstance(each, MsfusionError) for each in alone):
            return alone
        raise  # nobody's, but of training them together


def _report(
    method: Method, device: torch.device, tasks: Sequence[Task], data: Sequence[Batch], test: Batch | None
) -> list[Released | MsfusionError]:
    assert test is not None
    there = test.to(device)

    def report(task: Task, own: Batch) -> Update:
        return method.report(_task_on(device, task), own.to(device), there)

    return _each(method, "report", report, tasks, data)


# Conversations. Where a participant is, its training is a generator of requests; each is checked before it leaves.


def _trained(
    method: Method, ask_server: Callable[[Request], Response] | None, task: Task, data: Batch
) -> Update:
    """What a participant makes of its task, asking the server where it has a question."""
    made = method.train(task, data)
    if not isinstance(made, Generator):
        return made
    if ask_server is None:
        raise ConfigError(
            f"{method.name} asks the server while it trains, and nobody answers: give it a `conversation`, and an "
            "engine that carries it (msfusion.InProcess or msfusion.Processes)"
        )
    with closing(_checked(method, task, made)) as training:
        try:
            request = next(training)
            while True:
                request = training.send(ask_server(request))
        except StopIteration as end:
            update: Update = end.value
            return update


def _checked(method: Method, task: Task, training: Training) -> Training:
    """A participant's training, whose requests may leave: they are as declared, and on the CPU."""
    device = next((tensor.device for tensor in task.tensors.values()), CPU)
    with closing(training):
        try:
            request = next(training)
            while True:
                response = yield _released_request(method, task, request)
                request = training.send(replace(response, tensors=_on(device, response.tensors)))
        except StopIteration as end:
            update: Update = end.value
            return update


def _released_request(method: Method, task: Task, request: object) -> Request:
    """The request as what may leave the participant, its tensors `Shared`. Raises PrivacyError."""
    source = _source(task)
    if not isinstance(request, Request):
        raise PrivacyError(f"{source} would ask with a {type(request).__name__}: yield a Request")
    check_dense(request.tensors, source)
    tensors, declared = _on(CPU, request.tensors), method.outbound_request(task)
    shared = declared.select(tensors, request.metadata, source, request.pieces)
    return Request(request.pieces, shared, request.metadata)


@dataclass(frozen=True)
class Finished:
    """The end of a participant's talk: its update, or why it failed; and the seconds that it was at work."""

    answer: Released | MsfusionError
    seconds: float


Said = Request | Finished
"""What a participant says in its turn."""

Told = Response | MsfusionError
"""What it is told before; an error ends its talk."""

Talk = Generator[Request, Response | MsfusionError, Finished]


def talk(method: Method, task: Task, data: Batch, device: torch.device = CPU) -> Talk:
    """A participant's training in a conversation, to be gone on with by `say_next`. It raises nothing, as `perform`."""
    seconds, begin = 0.0, time.perf_counter()
    try:
        task = _received(method, task)
        there = _task_on(device, _plain(method, task))
        made = method.train(there, data.to(device))
        if isinstance(made, Generator):
            with closing(_checked(method, there, made)) as training:
                request = next(training)
                while True:
                    seconds += time.perf_counter() - begin
                    told = yield request
                    begin = time.perf_counter()
                    if isinstance(told, MsfusionError):
                        return Finished(told, seconds)
                    request = training.send(told)
    except StopIteration as end:
        made = end.value
    except Exception as error:
        return Finished(_failure(task, error), seconds)
    answer = _attempt(task, partial(_released, method, "train", task, made))
    return Finished(answer, seconds + time.perf_counter() - begin)


def say_next(talk: Talk, told: Told | None) -> Said:
    """What a participant says when it has been told something; None is its beginning.

    Raises TrainingError where its training would end the program.
    """
    with without_ending(TrainingError):
        try:
            return next(talk) if told is None else talk.send(told)
        except StopIteration as end:
            finished: Finished = end.value
            return finished


def _task_on(device: torch.device, task: Task) -> Task:
    return replace(task, tensors=_on(device, task.tensors), memory=_on(device, task.memory))


def _on(device: torch.device, tensors: State) -> dict[str, Tensor]:
    """The tensors on a device, with their entries in order, as they come from a file, a pipe or a network.

    Tensors of equal numbers that lie otherwise (who has made one by a transposition) are summed up with other rounding:
    a participant whose memory stays in its own process would go on with other bits than one whose memory comes back.
    """
    return {name: tensor.to(device).contiguous() for name, tensor in tensors.items()}
