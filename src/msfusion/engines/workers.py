"""Who does the participants' work: this process, or worker processes that live as long as the run.

A worker is forked, so it has the method and everybody's data without a copy, and keeps its sub-models from
round to round. It gets one task at a time over a pipe; while it works, the server prepares the next task
and fuses the last update. What a worker computes depends on the task alone, never on which worker it is.

Threads. Every worker runs PyTorch with the number of threads that it is told, one by default: two workers
of two threads on two cores are many times slower than two of one. A forked process cannot use OpenMP's
threads if its parent has used them (GNU's OpenMP hangs), so workers with more than one thread are started
afresh instead of forked, which takes seconds and needs a method that multiprocessing can pickle.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Literal, Protocol

import torch

from msfusion import errors
from msfusion.batch import Batch
from msfusion.engines.messages import (
    payload_bytes,
    receive,
    receive_task,
    send,
    send_task,
    send_update,
    update_of,
)
from msfusion.errors import MsfusionError, TrainingError
from msfusion.methods.base import Method, Recalibrating, Task, Update

Kind = Literal["train", "measure"]


class WorkerError(RuntimeError):
    """Something that is not a user's mistake went wrong in a worker; the message has its traceback."""


@dataclass(frozen=True)
class Done:
    """A finished task: the update, the seconds that it took, and the bytes that went down and up."""

    update: Update
    seconds: float
    bytes_down: int
    bytes_up: int


class Workers(Protocol):
    """Whoever does the participants' work."""

    def run(self, kind: Kind, tasks: Iterable[Task]) -> Generator[Done, None, None]:
        """Do all tasks, which are taken up one by one, and hand on what is done as it arrives."""

    def close(self) -> None:
        """Let go of all processes."""


def start_workers(method: Method, data: Sequence[Batch], workers: int, threads: int) -> Workers:
    """The caller's own process for one worker, else that many processes."""
    return InProcess(method, data) if workers == 1 else Pool(method, data, workers, threads)


class InProcess:
    """One worker: this process."""

    def __init__(self, method: Method, data: Sequence[Batch]) -> None:
        self._method, self._data = method, data

    def run(self, kind: Kind, tasks: Iterable[Task]) -> Generator[Done, None, None]:
        """One task after the other."""
        for task in tasks:
            update, seconds = _perform(self._method, kind, task, self._data)
            yield Done(update, seconds, payload_bytes(task.tensors), payload_bytes(update.tensors))

    def close(self) -> None:
        """Nothing to let go of."""


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    task: Task | None = None
    bytes_down: int = 0


class Pool:
    """Several worker processes. Raises here what a worker raised, and TrainingError where one dies."""

    def __init__(self, method: Method, data: Sequence[Batch], workers: int, threads: int) -> None:
        self._workers: list[_Worker] = []
        context = _context(threads)
        for index in range(workers):
            ours, theirs = context.Pipe()
            # A forked worker inherits our ends of the earlier pipes, and must close them: else they stay open
            # when we die, and the earlier workers wait forever.
            inherited = [worker.connection for worker in self._workers] if _forks(context) else []
            process = context.Process(
                target=_work,
                args=(theirs, [*inherited, ours] if _forks(context) else [], method, data, threads),
                name=f"msfusion-worker-{index}",
                daemon=True,
            )
            with warnings.catch_warnings():
                # Python 3.12 warns of forking while other threads run, such as a progress bar's; ours hold
                # no lock that a worker takes.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def run(self, kind: Kind, tasks: Iterable[Task]) -> Generator[Done, None, None]:
        """Whoever is free takes the next task. The next task is prepared while the workers work."""
        waiting = iter(tasks)
        upcoming = next(waiting, None)
        idle = list(self._workers)
        while True:
            while idle and upcoming is not None:
                self._give(idle.pop(), kind, upcoming)
                upcoming = next(waiting, None)
            busy = [worker for worker in self._workers if worker.task is not None]
            if not busy:
                return
            for worker in _ready(busy):
                done = self._take(worker)
                if upcoming is not None:
                    self._give(worker, kind, upcoming)
                    upcoming = next(waiting, None)
                else:
                    idle.append(worker)
                yield done

    def close(self) -> None:
        """End all workers, at once those that still work."""
        for worker in self._workers:
            worker.connection.close()  # an idle worker sees the end of its pipe and leaves
        for worker in self._workers:
            if worker.task is None:
                worker.process.join(timeout=2)
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join()
            worker.process.close()
        self._workers = []

    def _give(self, worker: _Worker, kind: Kind, task: Task) -> None:
        worker.task, worker.bytes_down = task, payload_bytes(task.tensors)
        try:
            send_task(worker.connection, kind, task)
        except OSError:
            raise _death(worker, task) from None

    def _take(self, worker: _Worker) -> Done:
        assert worker.task is not None
        try:
            header, tensors = receive(worker.connection)
        except (EOFError, OSError):
            raise _death(worker, worker.task) from None
        worker.task = None
        if "error" in header:
            raise _raised(header["error"], header["text"])
        update, seconds = update_of(header, tensors)
        return Done(update, seconds, worker.bytes_down, payload_bytes(tensors))


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


def _perform(method: Method, kind: Kind, task: Task, data: Sequence[Batch]) -> tuple[Update, float]:
    """A participant's work, and the seconds it took."""
    begin = time.perf_counter()
    own = data[task.participant]
    if kind == "train":
        return method.train(task, own), time.perf_counter() - begin
    assert isinstance(method, Recalibrating)
    return method.measure(task, own), time.perf_counter() - begin


def _work(
    connection: Connection,
    inherited: Sequence[Connection],
    method: Method,
    data: Sequence[Batch],
    threads: int,
) -> None:
    """The life of a worker process: one task after the other, until the pipe ends."""
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the server's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        while True:
            kind, task = receive_task(connection)
            try:
                update, seconds = _perform(method, kind, task, data)  # type: ignore[arg-type]
            except Exception as error:
                text = str(error) if isinstance(error, MsfusionError) else traceback.format_exc()
                send(connection, {"error": type(error).__name__, "text": text}, {})
            else:
                send_update(connection, update, seconds)


def _leave_with_parent() -> None:
    """End this process when its parent dies, even in the middle of a task."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _ready(busy: Sequence[_Worker]) -> list[_Worker]:
    """The workers that have answered or died; waits for the first."""
    found = wait([worker.connection for worker in busy] + [worker.process.sentinel for worker in busy])
    return [worker for worker in busy if worker.connection in found or worker.process.sentinel in found]


def _death(worker: _Worker, task: Task) -> TrainingError:
    worker.process.join(timeout=1)
    code = worker.process.exitcode
    how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
    return TrainingError(
        f"the worker process that trained participant {task.participant} in round {task.round_index} {how}: "
        "if memory ran out, use fewer workers, a smaller width ratio or a smaller batch size"
    )


def _raised(name: str, text: str) -> Exception:
    """What a worker raised: our own errors by their type and sentence, others with their traceback."""
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, MsfusionError):
        return kind(text)
    return WorkerError(f"a worker failed:\n{text}")


def _context(threads: int) -> ForkContext | SpawnContext:
    """Fork where that is safe: see the top of this file. (macOS's system libraries do not bear it.)"""
    forkable = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    if forkable and threads == 1 and not torch.cuda._initialized:
        return multiprocessing.get_context("fork")
    return multiprocessing.get_context("spawn")


def _forks(context: ForkContext | SpawnContext) -> bool:
    return context.get_start_method() == "fork"
