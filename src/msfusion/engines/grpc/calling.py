"""A participant's stream to the server, found again whenever it is lost."""

from __future__ import annotations

import math
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from msfusion.engines.grpc.access import CHECKING_SECONDS, Access, speaks_tls, why_refused
from msfusion.engines.grpc.frames import METHOD, PASSING, Goodbye
from msfusion.engines.grpc.listening import seconds_of
from msfusion.engines.grpc.messages import LARGEST_FRAME, Gathering, pieces_of
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.engines.grpc.service import KEEPALIVE_SECONDS
from msfusion.errors import StreamError
from msfusion.extras import require
from msfusion.setting import check

Answer = TypeVar("Answer")
Result = TypeVar("Result")

_LONGEST_PAUSE = 5.0

_SHORTEST = 0.5
"""The seconds that an attempt has, however little is left of the patience."""

CONNECTING_SECONDS = 10.0
"""How long one attempt to connect may take: a machine may let what it is sent fall."""

ANSWERING_SECONDS = 60.0
"""How long a server may take for its first word."""

OCCUPIED_SECONDS = 60.0
"""For how long our number may be somebody else's: the server takes so long, at most, to see that a connection is broken
that we had before."""

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
        require("stream", "training over a network")
        self.access.check_address(self.address)
        check(self)


class Lost(Exception):
    """The connection is lost, and may be found again."""


class Occupied(Lost):
    """Somebody is connected with our number: we ourselves, maybe, over a connection that is broken."""


class Stream:
    """One stream: a question, an answer, and so on. `seconds` is how long the first answer may take."""

    def __init__(self, connecting: Connecting, seconds: float) -> None:
        # gRPC gives up an attempt after this, which it calls the least time between two
        attempt = int(1000 * min(seconds, CONNECTING_SECONDS))
        options = [
            ("grpc.max_receive_message_length", LARGEST_FRAME),
            ("grpc.max_send_message_length", LARGEST_FRAME),
            ("grpc.compression_enabled_algorithms_bitset", 1),
            ("grpc.use_local_subchannel_pool", 1),  # a new channel tries at once
            ("grpc.min_reconnect_backoff_ms", attempt),
            ("grpc.initial_reconnect_backoff_ms", attempt),
            ("grpc.max_reconnect_backoff_ms", attempt),
            ("grpc.keepalive_time_ms", 1000 * KEEPALIVE_SECONDS),
            ("grpc.keepalive_timeout_ms", 1000 * KEEPALIVE_SECONDS),
        ]
        self.heard, self._gave_up = False, False
        # a short queue: pieces wait for those before them
        self._questions: queue.Queue[bytes | None] = queue.Queue(maxsize=8)
        self._channel = connecting.access.channel(connecting.address, options)
        call = self._channel.stream_stream(METHOD)
        self._answers = call(self._said(), metadata=connecting.access.metadata)
        self._impatience = threading.Timer(min(seconds, ANSWERING_SECONDS), self._give_up)
        self._impatience.daemon = True
        self._impatience.start()

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
        self._impatience.cancel()
        self._answers.cancel()
        with suppress(queue.Full):
            self._questions.put_nowait(None)
        self._channel.close()

    def _give_up(self) -> None:
        self._gave_up = not self.heard
        if self._gave_up:
            self._answers.cancel()

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
            if self._gave_up:
                raise Lost("nothing answers") from error
            if status == "ALREADY_EXISTS":
                raise Occupied(details) from error
            busy = status == "RESOURCE_EXHAUSTED" and "larger than max" not in details
            if status in PASSING or busy:
                raise Lost(details) from error
            raise StreamError(f"the server refuses: {details}", status) from error
        self.heard = True
        self._impatience.cancel()
        return answer


def persistently(connecting: Connecting, converse: Callable[[Stream], Result]) -> Result:
    """Converse with the server; whenever the connection is lost, look for it, and call `converse` again.

    Raises StreamError where the server refuses us, for whatever reason, and where it is away for too long.
    """
    where, patience = connecting.address, connecting.patience
    connecting.on_event(f"looking for the server at {where}, for at most {patience:g} seconds")
    search = _Search(connecting)
    while True:
        stream = Stream(connecting, max(search.left, _SHORTEST))
        try:
            return converse(stream)
        except Lost as error:
            if stream.heard:
                connecting.on_event("the connection is lost; looking for the server")
                search = _Search(connecting)
            else:
                search.failed(error)
        finally:
            stream.close()
        search.pause()


class _Search:
    """Looking for the server, from when it was lost until it is found."""

    def __init__(self, connecting: Connecting) -> None:
        self._connecting = connecting
        self._begin, self._occupied = time.monotonic(), math.inf  # since when our number is somebody else's
        self._pause, self._told = 0.1, ""
        # a generator of our own: what a model or data draw must not depend on the connection
        self._draws = random.Random()

    @property
    def left(self) -> float:
        """For how many seconds the server is still looked for."""
        return self._begin + self._connecting.patience - time.monotonic()

    def failed(self, error: Lost) -> None:
        """It was not found now: say why, the first time. Raises StreamError where it is not looked for any more."""
        where, patience = self._connecting.address, self._connecting.patience
        if isinstance(error, Occupied):
            self._occupied = min(self._occupied, time.monotonic())
            if self.left <= 0 or time.monotonic() - self._occupied >= OCCUPIED_SECONDS:
                raise StreamError(f"the server refuses: {error}", "ALREADY_EXISTS") from error
        elif (wrong := _what_is_wrong(self._connecting, max(self.left, _SHORTEST))) is not None:
            raise StreamError(f"the server at {where} cannot be used: {wrong}") from error
        elif self.left <= 0:
            raise StreamError(
                f"no server was found at {where} for {patience:g} seconds: {error}", "UNAVAILABLE"
            ) from error
        why = "our number is taken" if isinstance(error, Occupied) else "no server yet"
        if why != self._told:
            self._told = why
            self._connecting.on_event(f"{why}, trying again: {error}")

    def pause(self) -> None:
        """Until the next attempt: longer each time."""
        time.sleep(max(0.0, min(self._pause * self._draws.uniform(0.5, 1.0), self.left)))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


def _what_is_wrong(connecting: Connecting, seconds: float) -> str | None:
    """Why waiting will not help, as far as it can be seen in so many seconds."""
    seconds = min(seconds, CHECKING_SECONDS)
    if connecting.access.is_plain:
        return "it wants TLS: give the certificates" if speaks_tls(connecting.address, seconds) else None
    return why_refused(connecting.access, connecting.address, seconds)
