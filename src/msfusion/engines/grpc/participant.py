"""A participant on its own machine: it does what the server hands out, and comes back whenever the connection is lost.

Nothing leaves but what the method declares (`perform` sees to it), how many examples there are, and digests of what
both sides must agree on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from msfusion.batch import Batch
from msfusion.engines.grpc.calling import Connecting, Stream, persistently
from msfusion.engines.grpc.frames import (
    FORMAT,
    Done,
    Examples,
    Failed,
    Hello,
    HowMany,
    Over,
    Ready,
    Reply,
    Say,
    Send,
    Thanks,
    Unanswered,
    Welcome,
    Work,
)
from msfusion.engines.grpc.kept import Kept, sent_of
from msfusion.engines.grpc.messages import response_in, task_in
from msfusion.engines.grpc.packing import Agreement
from msfusion.engines.grpc.sent import SentLog
from msfusion.errors import ConfigError, MsfusionError, TrainingError
from msfusion.federated.conversation import Request, Response
from msfusion.federated.engine import threads_set
from msfusion.federated.messages import request_message
from msfusion.federated.method import Kind, Method, Released, Task
from msfusion.federated.protected import as_run
from msfusion.federated.states import payload_bytes
from msfusion.federated.work import Finished, Talk, perform, say_next, talk
from msfusion.files import digest_of_json

MethodOf = Callable[[Sequence[int]], Method]
"""Makes the method of how many examples each participant has."""


def take_part(
    method: Method | MethodOf,
    data: Batch,
    connecting: Connecting,
    *,
    participant: int,
    agreement: Agreement,
    test: Batch | None = None,
    folder: Path | None = None,
    threads: int = 1,
    log: Path | None = None,
) -> int:
    """Take part in all rounds of a server with the same method, as one of its participants; how many there were.

    Where participants have data of their own, `method` is made of how many examples each has, as the server says.
    `test` is the common test data, for methods that ask participants for a report. What the method has a participant
    keep between rounds goes to files in `folder`, so that a participant that is killed can go on (default: it stays in
    this process's memory); as many rounds of it stay as the server says that it may go back. What leaves the
    participant is told in the file `log`, a line for each message. A method trains in working space of its own, so
    participants in threads of one process need one each. Raises StreamError where the server refuses us or is away for
    too long, RunDirectoryError where what was kept is not there, ConfigError where another participant has the method.
    """
    kept = Kept(folder, digest_of_json([agreement, participant]))
    worker = _Worker(method, data, test, participant, agreement, kept, connecting, SentLog(log))
    shared = (
        _taken(method) if isinstance(method, Method) else nullcontext()
    )  # what is made here is nobody else's
    with shared, threads_set(threads):
        return persistently(connecting, worker.converse)


_in_use: dict[int, object] = {}
"""The methods of the participants in this process, by their identity."""


@contextmanager
def _taken(method: Method) -> Iterator[None]:
    """The method for one participant alone. Raises ConfigError where another one has it."""
    mine = object()
    if _in_use.setdefault(id(method), mine) is not mine:
        raise ConfigError(
            f"this {method.name} is the method of another participant in this process, and would train for both at "
            "once: build one for each"
        )
    try:
        yield
    finally:
        del _in_use[id(method)]


class _Worker:
    """A participant's work, which outlives connections."""

    def __init__(
        self,
        method: Method | MethodOf,
        data: Batch,
        test: Batch | None,
        participant: int,
        agreement: Agreement,
        kept: Kept,
        connecting: Connecting,
        log: SentLog,
    ) -> None:
        self._log = log
        self._data, self._test = data, test
        self._method: Method | MethodOf = as_run(method) if isinstance(method, Method) else method
        self._participant, self._kept, self._tell = participant, kept, connecting.on_event
        self._hello = Hello(FORMAT, participant, os.urandom(16), len(data), agreement)
        self._done: tuple[bytes, bytes | None] = (b"", None)  # the last work, and what came of it
        self._talking: Talking | None = None

    @property
    def method(self) -> Method:
        """There once the server has been met."""
        assert isinstance(self._method, Method)
        return self._method

    @cached_property
    def _largest(self) -> int:
        """The most bytes of a message from the server."""
        return max(2**30, 8 * payload_bytes(self.method.initial_state()))

    def converse(self, stream: Stream) -> int:
        """Do what is handed out until all rounds are done; how many there were. Raises Lost; can be called again."""
        self._log.hello(len(self._data), self._hello.agreement)
        self._kept.rounds = stream.ask(self._hello, Welcome).rounds_kept
        self._tell("connected")
        if not isinstance(self._method, Method):
            self._method = as_run(self._method(stream.ask(HowMany(), Examples).counts))
        while True:
            work: Work | Over = stream.ask(Ready(), Work, Over)
            if isinstance(work, Over):
                stream.say_goodbye()
                self._kept.clear()
                return work.rounds
            message = stream.receive(work.size, self._largest)
            kind, task, converses = task_in(message, self._participant)
            if converses:
                self._done = work.work, self._talk(stream, work, task)
            elif work.work != self._done[0]:
                self._done = work.work, self._do(kind, self._with_memory(task, work))
            self._hand_in(stream, *self._done)

    def _talk(self, stream: Stream, work: Work, task: Task) -> bytes | None:
        """Do a task in the middle of which the server is asked. Goes on with what is under way, if the server does."""
        talking = self._talking
        if talking is None or not talking.goes_on(work):
            task = self._with_memory(task, work)
            training = talk(self.method, task, self._data)
            talking = self._talking = Talking(work.work, training, self._largest, self._log)
        finished = talking.go_on(stream)
        return self._message("train", task, finished.answer, finished.seconds)

    def _with_memory(self, task: Task, work: Work) -> Task:
        return replace(task, memory=self._kept.load(work.kept, self.method.first_memory))

    def _hand_in(self, stream: Stream, work: bytes, update: bytes | None) -> None:
        if update is None:
            stream.ask(Failed(work), Thanks)
        elif isinstance(stream.ask(Done(work, len(update)), Send, Thanks), Send):
            self._log.message("update", update)
            stream.send(update, Thanks)

    def _do(self, kind: Kind, task: Task) -> bytes | None:
        """The update as a message; None where the participant could not do it."""
        everybody = [self._data] * (self._participant + 1)  # nobody else's place is looked at
        (answer,), seconds = perform(self.method, kind, [task], everybody, test=self._test)
        return self._message(kind, task, answer, seconds)

    def _message(
        self, kind: Kind, task: Task, answer: Released | MsfusionError, seconds: float
    ) -> bytes | None:
        told = self._kept, self._tell, self.method.tells_losses
        return sent_of(kind, task, answer, seconds, len(self._data), *told)


class Talking:
    """A task in the middle of which the server is asked, as far as it has come."""

    def __init__(self, work: bytes, talk: Talk, largest: int, log: SentLog) -> None:
        self._work, self._talk, self._largest, self._log = work, talk, largest, log
        self._step = 0
        self._said = say_next(talk, None)

    def goes_on(self, work: Work) -> bool:
        """Whether the server goes on where this is. One that was started again has forgotten what was asked."""
        return work.work == self._work and work.answered >= self._step

    def go_on(self, stream: Stream) -> Finished:
        """Ask until it is done. Raises Lost, and can be called again."""
        while isinstance(self._said, Request):
            told = self._told(stream, request_message(self._said))
            self._step += 1
            self._said = say_next(self._talk, told)
        return self._said

    def _told(self, stream: Stream, request: bytes) -> Response | MsfusionError:
        say, expected = Say(self._work, self._step, len(request)), (Reply, Unanswered, Thanks)
        answer = stream.ask(say, Send, *expected)
        if isinstance(answer, Send):
            self._log.message("request", request)
            answer = stream.send(request, *expected)
        if isinstance(answer, Reply):
            return response_in(stream.receive(answer.size, self._largest))
        why = answer.why if isinstance(answer, Unanswered) else "nobody waits for this task any more"
        return TrainingError(f"the server did not answer: {why}")
