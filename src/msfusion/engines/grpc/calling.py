"""A participant's stream to the server, found again whenever it is lost."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from msfusion.engines.grpc.access import Access, speaks_tls, why_refused
from msfusion.engines.grpc.frames import METHOD, PASSING, Goodbye
from msfusion.engines.grpc.listening import seconds_of
from msfusion.engines.grpc.messages import LARGEST_FRAME, Gathering, pieces_of
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.engines.grpc.service import KEEPALIVE_SECONDS
from msfusion.errors import StreamError
from msfusion.setting import check

Answer = TypeVar("Answer")
Result = TypeVar("Result")

_LONGEST_PAUSE = 5.0

GOODBYE_SECONDS = 5.0
"""How long the server may take to hear that we know that it is over."""


@dataclass(frozen=True)
class Connecting:
    """Where the server is, and for how many seconds to look for it whenever it is away.

    `on_event` is told what happens to the connection, and what was done. Raises ConfigError.
    """

    address: str
    access: Access
    patience: float = seconds_of(600.0, "for which the server is looked for")
    on_event: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        self.access.check_address(self.address)
        check(self)


class Lost(Exception):
    """The connection is lost, and may be found again."""


class Stream:
    """One stream: a question, an answer, and so on."""

    def __init__(self, connecting: Connecting) -> None:
        options = [
            ("grpc.max_receive_message_length", LARGEST_FRAME),
            ("grpc.max_send_message_length", LARGEST_FRAME),
            ("grpc.compression_enabled_algorithms_bitset", 1),
            ("grpc.use_local_subchannel_pool", 1),  # a new channel tries at once
            ("grpc.keepalive_time_ms", 1000 * KEEPALIVE_SECONDS),
            ("grpc.keepalive_timeout_ms", 1000 * KEEPALIVE_SECONDS),
        ]
        self.heard = False
        # a short queue: pieces wait for those before them
        self._questions: queue.Queue[bytes | None] = queue.Queue(maxsize=8)
        self._channel = connecting.access.channel(connecting.address, options)
        call = self._channel.stream_stream(METHOD)
        self._answers = call(self._said(), metadata=connecting.access.metadata)

    @overload
    def ask(self, question: Any, expected: type[Answer], /) -> Answer: ...

    @overload
    def ask(self, question: Any, /, *expected: Any) -> Any: ...

    def ask(self, question: Any, /, *expected: Any) -> Any:
        """Say something and wait for the answer. Raises Lost, or StreamError where the server refuses it."""
        self._say(pack(question))
        return unpack(self._heard(), *expected)

    @overload
    def send(self, message: bytes, expected: type[Answer], /) -> Answer: ...

    @overload
    def send(self, message: bytes, /, *expected: Any) -> Any: ...

    def send(self, message: bytes, /, *expected: Any) -> Any:
        """Send a message in pieces, and wait for the answer to all of it. Raises as `ask` does."""
        for piece in pieces_of(message):
            self._say(piece)
        return unpack(self._heard(), *expected)

    def receive(self, size: int, most: int) -> bytes:
        """A message that comes in pieces. Raises as `ask` does."""
        gathering = Gathering(size, most)
        while gathering.missing:
            gathering.add(self._heard())
        return gathering.message()

    def say_goodbye(self) -> None:
        """Let the server know that its last answer has come; it ends the stream then, or we do."""
        impatience = threading.Timer(GOODBYE_SECONDS, self._answers.cancel)
        impatience.start()
        with suppress(Lost, StreamError):
            self._say(pack(Goodbye()))
            self._heard()
        impatience.cancel()

    def close(self) -> None:
        """End it."""
        self._answers.cancel()
        with suppress(queue.Full):
            self._questions.put_nowait(None)
        self._channel.close()

    def _said(self) -> Iterator[bytes]:
        """What gRPC's own thread takes up, one after the other."""
        while (said := self._questions.get()) is not None:
            yield said

    def _say(self, message: bytes) -> None:
        while True:
            try:
                return self._questions.put(message, timeout=1.0)
            except queue.Full:
                if not self._answers.is_active():
                    return None  # nobody takes anything up any more; why is told when we listen

    def _heard(self) -> bytes:
        import grpc

        try:
            answer: bytes = next(self._answers)
        except StopIteration:
            raise Lost("the server ended the conversation") from None
        except grpc.RpcError as error:
            status, details = error.code().name, " ".join((error.details() or "").split())
            busy = status == "RESOURCE_EXHAUSTED" and "larger than max" not in details
            if status in PASSING or busy:
                raise Lost(details) from error
            raise StreamError(f"the server refuses: {details}", status) from error
        self.heard = True
        return answer


def persistently(connecting: Connecting, converse: Callable[[Stream], Result]) -> Result:
    """Converse with the server; whenever the connection is lost, look for it, and call `converse` again.

    Raises StreamError where the server refuses us, for whatever reason, and where it is away for too long.
    """
    where, patience = connecting.address, connecting.patience
    connecting.on_event(f"looking for the server at {where}, for at most {patience:g} seconds")
    pause, last = 0.1, time.monotonic()
    # a generator of our own: what a model or data draw must not depend on the connection
    draws = random.Random()
    while True:
        stream = Stream(connecting)
        try:
            return converse(stream)
        except Lost as error:
            if stream.heard:
                pause, last = 0.1, time.monotonic()
                connecting.on_event("the connection is lost; looking for the server")
            elif (wrong := _what_is_wrong(connecting)) is not None:
                raise StreamError(f"the server at {where} cannot be used: {wrong}") from error
            if time.monotonic() - last > patience:
                raise StreamError(
                    f"no server was found at {where} for {patience:g} seconds: {error}", "UNAVAILABLE"
                ) from error
        finally:
            stream.close()
        time.sleep(pause * draws.uniform(0.5, 1.0))
        pause = min(2 * pause, _LONGEST_PAUSE)


def _what_is_wrong(connecting: Connecting) -> str | None:
    """Why waiting will not help."""
    if connecting.access.is_plain:
        return "it wants TLS: give the certificates" if speaks_tls(connecting.address) else None
    return why_refused(connecting.access, connecting.address)
