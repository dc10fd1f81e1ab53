"""A server and participants of any method over real sockets, in threads; and hand-made ones that misbehave."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import Any

import grpc

from msfusion.batch import Batch
from msfusion.engines.grpc.access import Access
from msfusion.engines.grpc.calling import Connecting
from msfusion.engines.grpc.frames import (
    FORMAT,
    METHOD,
    Done,
    Failed,
    Hello,
    Ready,
    Send,
    Thanks,
    Welcome,
    Work,
)
from msfusion.engines.grpc.listening import Listening
from msfusion.engines.grpc.messages import Gathering, pieces_of
from msfusion.engines.grpc.network import Network
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.engines.grpc.participant import take_part
from msfusion.errors import StreamError
from msfusion.federated.engine import Answer, Ask, Engine
from msfusion.federated.method import Method

NOTHING = Access()
AGREED: dict[str, Any] = {"model": "small"}
HERE = Listening("127.0.0.1:0", NOTHING, deadline=30.0, patience=30.0, farewell=5.0)


class Loopback(Engine):
    """An engine whose participants are threads that come over the network; those in `absent` do not come.

    Each trains with a method of its own, which `own` makes.
    """

    converses = True

    def __init__(
        self,
        listening: Listening = HERE,
        absent: Sequence[int] = (),
        own: Callable[[Method], Method] | None = None,
    ) -> None:
        self._own = own or own_method
        self.address, self.events = "", list[str]()
        self._listening = replace(listening, on_listening=self._listens, on_event=self.events.append)
        self._absent = absent
        self._threads: list[threading.Thread] = []

    def _listens(self, address: str) -> None:
        self.address = address

    def open(self, data: Sequence[Batch], test: Batch | None = None) -> None:
        self._data, self._test = data, test
        self.network = Network(self._listening, [len(own) for own in data], AGREED)
        self.network.__enter__()

    def run(self, method: Method, asks: Sequence[Ask]) -> Iterator[Answer]:
        if not self._threads:
            for participant in range(len(self._data)):
                if participant not in self._absent:
                    own = self._own(method)
                    self._threads.append(
                        threading.Thread(target=self._take_part, args=(own, participant), daemon=True)
                    )
                    self._threads[-1].start()
        yield from self.network.run(method, asks)

    def _take_part(self, method: Method, participant: int) -> None:
        with suppress(StreamError):  # that the test is over
            take_part(
                method,
                self._data[participant],
                Connecting(self.address, self._listening.access, 30.0),
                participant=participant,
                agreement=AGREED,
                test=self._test,
            )

    def close(self) -> None:
        if self._absent:
            self.network.__exit__(StreamError, StreamError("the test is over"), None)
        else:
            self.network.say_over(1)
            self.network.__exit__(None, None, None)
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        self._threads = []


def own_method(method: Method) -> Method:
    """One for each participant, which trains in working space of its own."""
    return method.build(method.problem) if hasattr(method, "problem") else deepcopy(method)


class Hand:
    """A participant made by hand, that can say anything."""

    def __init__(self, address: str, access: Access = NOTHING) -> None:
        self._said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel = access.channel(address, [("grpc.use_local_subchannel_pool", 1)])
        stream = self._channel.stream_stream(METHOD)
        self._answers = stream(iter(self._said.get, None), metadata=access.metadata, timeout=30)

    def __enter__(self) -> Hand:
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.cancel()
        self._said.put(None)
        self._channel.close()

    def say(self, what: object) -> None:
        self._said.put(what if isinstance(what, bytes) else pack(what))

    def heard(self, *kinds: type[Any]) -> Any:
        """The next answer. Raises grpc.RpcError where the stream has ended."""
        return unpack(next(self._answers), *kinds)

    def piece(self) -> bytes:
        """The next answer as it comes."""
        answer: bytes = next(self._answers)
        return answer

    def work(self, participant: int, examples: int) -> tuple[Work, bytes]:
        """Come, ask what is to be done, and take the task."""
        self.say(hello(participant, examples))
        self.heard(Welcome)
        self.say(Ready())
        work = self.heard(Work)
        task = Gathering(work.size, 2**24)
        while task.missing:
            task.add(self.piece())
        return work, task.message()

    def hand_in(self, work: Work, update: bytes) -> None:
        """Say that a task is done, and send this for it."""
        self.say(Done(work.work, len(update)))
        self.heard(Send)
        for piece in pieces_of(update):
            self.say(piece)
        self.heard(Thanks)

    def fail(self, work: Work) -> None:
        """Say that a task could not be done."""
        self.say(Failed(work.work))
        self.heard(Thanks)

    def refused(self) -> tuple[str, str]:
        """The status and the sentence with which the stream ends."""
        try:
            next(self._answers)
        except grpc.RpcError as error:
            return error.code().name, error.details()
        raise AssertionError("the server went on")


def hello(participant: int, examples: int, **changes: Any) -> Hello:
    known = {"session": b"by hand", "examples": examples, "agreement": AGREED}
    return Hello(**{"format": FORMAT, "participant": participant, **known, **changes})
