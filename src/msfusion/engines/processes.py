"""Worker processes that live as long as the run.

A worker is forked, so it has the method and everybody's data without a copy, and keeps its sub-models from
round to round. Tasks and updates travel over a pipe, the *wire*: all that would cross between the server's
machine and a participant's. What a participant keeps for itself stands on its *shelf*, a pipe of its own, because
its memory outlives the worker that it happens to use. So does what went wrong with it: an error's text may quote
its data and is for the user of its machine, which here is this one; over the wire goes only that it failed. A worker
reads its next task while it works on one, so that it never waits for the server, which fuses meanwhile. What a worker
computes depends on the task alone, never on which worker it is.

In a conversation all participants of a round go on side by side, so each worker has several of them, and says for each
in its turn what it asks, until it has an update.

Threads. Every worker runs PyTorch with the number of threads that it is told, one by default: two workers of
two threads on two cores are many times slower than two of one. A forked process cannot use several OpenMP
threads if its parent has used them (GNU's OpenMP then waits forever), so a worker with several tries them
before its first task.

Where forking is not safe (macOS) or not there (Windows), workers are started afresh, which takes seconds and
needs a method that multiprocessing can pickle.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor

from msfusion import errors
from msfusion.batch import Batch
from msfusion.errors import ConfigError, MsfusionError, TrainingError
from msfusion.federated.conversation import Request, Response
from msfusion.federated.engine import Answer, Ask, Engine, answer_to, turn_by_turn
from msfusion.federated.messages import (
    Header,
    encode,
    receive,
    request_message,
    request_of,
    response_message,
    response_of,
    send,
    task_message,
    task_of,
    update_message,
    update_of,
)
from msfusion.federated.method import Kind, Method, Released, Task
from msfusion.federated.work import Finished, Said, Talk, Told, perform, say_next, talk
from msfusion.imports import who_ended

StartMethod = Literal["fork", "spawn"]

THREADS_TIMEOUT = 30.0
"""Seconds that a worker may take to start and to use several threads for the first time."""


class WorkerError(RuntimeError):
    """Something that is not a user's mistake went wrong in a worker; the message has its traceback."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    shelf: Connection
    jobs: deque[Sequence[Task]] = field(default_factory=deque)  # at work on the first
    told: deque[int] = field(default_factory=deque)  # in a conversation, who speaks next: in this order


class Processes(Engine):
    """Several worker processes on this machine, each with so many threads of PyTorch.

    What one of them raises is raised here, and TrainingError where one dies. `start_method` is how processes begin
    (None: by fork where that is safe). Raises ConfigError for fewer than one process or thread.
    """

    converses: ClassVar[bool] = True

    def __init__(self, workers: int, threads: int = 1, start_method: StartMethod | None = None) -> None:
        for name, value in (("workers", workers), ("threads", threads)):
            if value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")
        self._count, self._threads, self._start_method = workers, threads, start_method
        self._data: Sequence[Batch] = ()
        self._test: Batch | None = None
        self._method: Method | None = None
        self._workers: list[_Worker] = []

    def open(self, data: Sequence[Batch], test: Batch | None = None) -> None:
        """Keep them for the workers, which are started with the first `run`, as they are given the method as well."""
        self._data, self._test = data, test

    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        """Whoever is free takes the next task, while the server fuses what was handed on."""
        if method is not self._method:
            self._start_all(method)
        if any(ask.conversation for ask in asks):
            yield from self._turn_by_turn(asks)
            return
        waiting = deque(asks)
        self._hand_out(waiting)
        while busy := [worker for worker in self._workers if worker.jobs]:
            for worker in _ready(busy):
                finished = _take(worker)
                self._hand_out(waiting)
                yield from finished

    def _turn_by_turn(self, asks: Sequence[Ask]) -> Iterator[Answer]:
        """Everybody goes on side by side, the participants shared out among the workers."""
        at: dict[int, _Worker] = {}

        def tell(who: int, word: Task | Told) -> None:
            if isinstance(word, Task):
                worker = at[who] = self._workers[len(at) % len(self._workers)]
                _give(worker, "train", [word], converses=True)
            else:
                _tell(at[who], who, word)
            at[who].told.append(who)

        def hear(among: Sequence[int]) -> tuple[int, Said]:
            worker = at[among[0]]
            return worker.told.popleft(), _said(worker)

        yield from turn_by_turn(asks, tell, hear)
        for worker in self._workers:
            worker.jobs.clear()

    def _start_all(self, method: Method) -> None:
        """Start the workers with a method, at most one for each participant."""
        self.close()
        work = (method, self._data, self._test, self._threads)
        try:
            for _ in range(min(self._count, len(self._data))):
                self._start(work, self._start_method or _start_method())
            for worker in self._workers if self._threads > 1 else []:
                _await_threads(worker, self._threads)
        except BaseException:
            self.close()
            raise
        self._method = method

    def _hand_out(self, waiting: deque[Ask]) -> None:
        """Give every worker a job, and a second one to begin with at once when it has done the first.

        The second only while many wait: near the end of a round it may otherwise wait behind a long task of
        one worker while another has nothing to do.
        """
        for depth in (1, 2):
            for worker in self._workers:
                if (
                    waiting
                    and len(worker.jobs) < depth
                    and (depth == 1 or len(waiting) >= len(self._workers))
                ):
                    ask = waiting.popleft()
                    _give(worker, ask.kind, ask.tasks())

    def close(self) -> None:
        """End all workers, at once those that still work."""
        for worker in self._workers:
            worker.connection.close()  # an idle worker sees the end of its pipe and leaves
            worker.shelf.close()
        for worker in self._workers:
            if not worker.jobs:
                worker.process.join(timeout=2)
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join()
            worker.process.close()
        self._workers, self._method = [], None

    def _start(
        self, work: tuple[Method, Sequence[Batch], Batch | None, int], start_method: StartMethod
    ) -> None:
        """Start one more worker. Raises ConfigError where the method must be pickled and cannot."""
        # The same class on all systems, as far as its type is concerned.
        context = cast(multiprocessing.context.DefaultContext, multiprocessing.get_context(start_method))
        (ours, theirs), (our_shelf, their_shelf) = context.Pipe(), context.Pipe()
        # A forked worker inherits our ends of the pipes so far, and must close them: else they stay open
        # when we die, and the earlier workers wait forever.
        earlier = [end for worker in self._workers for end in (worker.connection, worker.shelf)]
        inherited = [*earlier, ours, our_shelf] if start_method == "fork" else []
        process = context.Process(target=_work, args=(theirs, their_shelf, inherited, *work), daemon=True)
        try:
            with warnings.catch_warnings():
                # Python 3.12 warns of forking while other threads run, such as a progress bar's: a worker
                # takes none of their locks.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"this system cannot fork worker processes, and one cannot be started afresh ({error}): "
                "set workers to 1"
            ) from error
        theirs.close()
        their_shelf.close()
        self._workers.append(_Worker(process, ours, our_shelf))


def _give(worker: _Worker, kind: Kind, tasks: Sequence[Task], converses: bool = False) -> None:
    """Send the tasks of an ask to a worker. It reads even while it works, so this does not wait."""
    worker.jobs.append(tasks)
    try:
        for index, task in enumerate(tasks, 1):
            more = index < len(tasks)
            send(worker.connection, task_message(kind, task, more, converses))
            if task.memory:
                send(worker.shelf, encode({}, task.memory))
    except OSError:
        raise _death(worker) from None


def _tell(worker: _Worker, participant: int, told: Told) -> None:
    """Send what one of its participants asked for, or why there is no answer."""
    if isinstance(told, Response):
        message = response_message(told, participant=participant)
    else:
        message = encode(
            {"said": "refused", "participant": participant, "error": type(told).__name__, "text": str(told)},
            {},
        )
    try:
        send(worker.connection, message)
    except OSError:
        raise _death(worker) from None


def _take(worker: _Worker) -> list[Answer]:
    """What a worker that is ready has to say about its job."""
    finished = []
    for task in worker.jobs[0]:
        said = _said(worker)
        assert isinstance(said, Finished)  # it was asked outside of any conversation
        finished.append(answer_to(task, said.answer, said.seconds))
    worker.jobs.popleft()
    return finished


def _said(worker: _Worker) -> Said:
    """What a worker says next for a participant: a request, or what came of its task.

    Raises what is nobody's fault alone.
    """
    try:
        header, tensors = receive(worker.connection)
        if "failed" in header:
            error, _ = receive(worker.shelf)
            failure = _raised(error["error"], error["text"], error["cause"])
            if header["failed"] == "participant" and isinstance(failure, MsfusionError):
                return Finished(failure, header["seconds"])
            worker.jobs.popleft()
            raise failure
        if "said" in header:
            return request_of(header, tensors)
        update, seconds, remembers = update_of(header, tensors)
        if remembers:
            update = replace(update, memory=receive(worker.shelf)[1])
    except (EOFError, OSError):
        raise _death(worker) from None
    return Finished(Released(update), seconds)


def _ready(busy: Sequence[_Worker]) -> list[_Worker]:
    """The workers that have answered or died; waits for the first."""
    found = wait([worker.connection for worker in busy] + [worker.process.sentinel for worker in busy])
    return [worker for worker in busy if worker.connection in found or worker.process.sentinel in found]


def _await_threads(worker: _Worker, threads: int) -> None:
    """Wait until a worker has used several threads. Raises ConfigError where it hangs."""
    if not worker.connection.poll(THREADS_TIMEOUT):
        worker.process.kill()
        raise ConfigError(
            f"a worker with {threads} threads hangs, because this process used several threads before: "
            "call torch.set_num_threads(1) at the start of your program, or set threads to 1"
        )
    with suppress(EOFError, OSError):  # a worker that died is noticed with its first task
        worker.connection.recv_bytes()


def _death(worker: _Worker) -> TrainingError:
    task = worker.jobs[0][0]
    worker.process.join(timeout=1)
    code = worker.process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
    return TrainingError(
        f"the worker process that trained participant {task.participant} in round {task.round_index + 1} {how}: "
        "if memory ran out, use fewer workers, a smaller width ratio or a smaller batch size"
    )


def _raised(name: str, text: str, cause: str | None) -> Exception:
    """What a worker raised: our own errors by their type and sentence, others with their traceback.

    `cause` is the traceback of what one of ours was made of.
    """
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, MsfusionError):
        error = kind(text)
        error.__cause__ = None if cause is None else WorkerError(f"in a worker:\n{cause}")
        return error
    return WorkerError(f"a worker failed:\n{text}")


def _start_method() -> StartMethod:
    """Fork where that is safe: see the top of this file."""
    forkable = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    return "fork" if forkable else "spawn"


def _work(
    connection: Connection,
    shelf: Connection,
    inherited: Sequence[Connection],
    method: Method,
    data: Sequence[Batch],
    test: Batch | None,
    threads: int,
) -> None:
    """The life of a worker process: one task after the other, until the pipe ends."""
    gc.freeze()  # what the server has left in cycles is its to end: a connection of gRPC has no threads here
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    if threads > 1:
        torch.ones(1 << 20).sqrt_()  # hangs here or never
        connection.send_bytes(b"threads work")
    jobs: queue.SimpleQueue[_Job | _Word] = queue.SimpleQueue()
    threading.Thread(target=_read_jobs, args=(connection, shelf, jobs), daemon=True).start()
    talks: dict[int, Talk] = {}
    with suppress(OSError):  # nobody reads any more
        while True:
            try:
                answers = _done(jobs.get(), talks, method, data, test)
            except KeyboardInterrupt as error:  # not Ctrl-C, to which a worker is deaf
                answers = [_failure("job", TrainingError(who_ended(error)), 0.0)]
            except Exception as error:
                answers = [_failure("job", error, 0.0)]
            for message, kept in answers:
                send(connection, message)
                if kept is not None:
                    send(shelf, kept)


@dataclass(frozen=True)
class _Job:
    """Tasks to be done together, or the one of a participant that asks as it goes on."""

    kind: Kind
    tasks: list[Task]
    converses: bool


@dataclass(frozen=True)
class _Word:
    """What a participant in a conversation is told."""

    participant: int
    told: Response | MsfusionError


def _done(
    job: _Job | _Word, talks: dict[int, Talk], method: Method, data: Sequence[Batch], test: Batch | None
) -> list[tuple[bytes, bytes | None]]:
    """The messages that a job comes to, and what stands on the shelf with each. `talks` are those that go on."""
    if isinstance(job, _Job) and not job.converses:
        answered, seconds = perform(method, job.kind, job.tasks, data, test=test)
        return [_messages(answer, seconds) for answer in answered]
    if isinstance(job, _Job):
        (task,) = job.tasks
        talks[task.participant] = talk(method, task, data[task.participant])
        who, said = task.participant, say_next(talks[task.participant], None)
    else:
        who, said = job.participant, say_next(talks[job.participant], job.told)
    if isinstance(said, Request):
        return [(request_message(said), None)]
    del talks[who]
    return [_messages(said.answer, said.seconds)]


def _messages(answer: Released | MsfusionError, seconds: float) -> tuple[bytes, bytes | None]:
    """What goes over the wire, and what stands on the shelf."""
    if isinstance(answer, MsfusionError):
        return _failure("participant", answer, seconds)
    return update_message(answer, seconds), encode({}, answer.memory) if answer.memory else None


def _failure(whose: Literal["job", "participant"], error: Exception, seconds: float) -> tuple[bytes, bytes]:
    """The same for what went wrong: of one participant, or of a whole job."""
    text = str(error) if isinstance(error, MsfusionError) else traceback.format_exc()
    cause = "".join(traceback.format_exception(error.__cause__)) if error.__cause__ is not None else None
    told = encode({"error": type(error).__name__, "text": text, "cause": cause}, {})
    return encode({"failed": whose, "seconds": seconds}, {}), told


def _read_jobs(connection: Connection, shelf: Connection, jobs: queue.SimpleQueue[_Job | _Word]) -> None:
    """Read ahead of the work. Where the pipe ends, the server let go or died: leave at once."""
    with suppress(EOFError, OSError):
        tasks: list[Task] = []
        while True:
            header, tensors = receive(connection)
            if "said" in header:
                jobs.put(_Word(header["participant"], _told(header, tensors)))
                continue
            memory = receive(shelf)[1] if header["remembers"] else {}
            tasks.append(task_of(header, tensors, memory))
            if not header["more"]:
                jobs.put(_Job(header["kind"], tasks, header["converses"]))
                tasks = []
    os._exit(0)


def _told(header: Header, tensors: dict[str, Tensor]) -> Response | MsfusionError:
    if header["said"] == "response":
        return response_of(header, tensors)
    refused = _raised(header["error"], header["text"], None)
    return refused if isinstance(refused, MsfusionError) else TrainingError(header["text"])
