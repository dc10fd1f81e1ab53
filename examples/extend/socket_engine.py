"""An engine of one's own: every task and update crosses a TCP socket as bytes, to other processes and back.

    msfusion train --set run.engine=socket_engine:Sockets

Messages are JSON and safetensors (`msfusion.federated.messages`), never pickles; each has its length in front. What a
participant keeps for itself stays in its process: only a run that goes on hands it over again.
"""

from __future__ import annotations

import multiprocessing
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

import msfusion
from msfusion.errors import TrainingError
from msfusion.federated.engine import answer_to
from msfusion.federated.messages import decode, encode, task_message, task_of, update_message, update_of

LENGTH = struct.Struct("<Q")


@msfusion.engine("sockets")
class Sockets(msfusion.Engine):
    """So many processes, each of which does the work of every n-th participant."""

    def __init__(self, workers: int = 2) -> None:
        self.workers = workers
        self.links: list[socket.socket] = []
        self.processes: list[multiprocessing.process.BaseProcess] = []

    def open(self, data: Sequence[msfusion.Batch], test: msfusion.Batch | None = None) -> None:
        """Keep what the processes will be started with."""
        self.data, self.test = data, test

    def run(self, method: msfusion.Method, asks: Sequence[msfusion.Ask]) -> Iterator[msfusion.Answer]:
        """One ask after the other; a participant's own process answers it."""
        if not self.links:
            self._start(method)
        for ask in asks:
            for task in ask.tasks():
                link = self.links[task.participant % len(self.links)]
                send(link, task_message(ask.kind, task))
                send(link, encode({}, task.memory))
                header, tensors = decode(receive(link))
                if "failed" in header:
                    yield answer_to(task, TrainingError(header["failed"]), header["seconds"])
                    continue
                update, seconds, _ = update_of(header, tensors)
                _, memory = decode(receive(link))
                yield answer_to(task, replace(update, memory=memory), seconds)

    def close(self) -> None:
        """A process ends when its socket does."""
        for link in self.links:
            link.close()
        for process in self.processes:
            process.join(timeout=5)
            process.kill()
            process.join()
        self.links, self.processes = [], []

    def _start(self, method: msfusion.Method) -> None:
        with socket.create_server(("127.0.0.1", 0)) as door:
            context = multiprocessing.get_context("fork")
            for _ in range(self.workers):
                work = door.getsockname(), method, self.data, self.test
                self.processes.append(context.Process(target=serve, args=work, daemon=True))
                self.processes[-1].start()
                self.links.append(door.accept()[0])


def serve(
    address: tuple[str, int],
    method: msfusion.Method,
    data: Sequence[msfusion.Batch],
    test: msfusion.Batch | None,
) -> None:
    """A process of participants: a task, its work, an update, until the socket ends."""
    torch.set_num_threads(1)
    with socket.create_connection(address) as link:
        while True:
            try:
                (header, tensors), (_, memory) = decode(receive(link)), decode(receive(link))
            except ConnectionError:
                return
            task = task_of(header, tensors, memory)
            (found,), seconds = msfusion.perform(method, header["kind"], [task], data, test=test)
            if isinstance(found, msfusion.MsfusionError):
                send(link, encode({"failed": str(found), "seconds": seconds}, {}))
                continue
            send(link, update_message(found, seconds))
            send(link, encode({}, found.memory))


def send(link: socket.socket, message: bytes) -> None:
    """A message, its length in front."""
    link.sendall(LENGTH.pack(len(message)) + message)


def receive(link: socket.socket) -> bytes:
    """The next message. Raises ConnectionError where there is none any more."""
    (length,) = LENGTH.unpack(exactly(link, LENGTH.size))
    return exactly(link, length)


def exactly(link: socket.socket, count: int) -> bytes:
    """So many bytes."""
    parts = []
    while count:
        parts.append(link.recv(min(count, 1 << 20)))
        if not parts[-1]:
            raise ConnectionError("the other side is gone")
        count -= len(parts[-1])
    return b"".join(parts)
