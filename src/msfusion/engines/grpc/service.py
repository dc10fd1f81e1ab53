"""The streams on the server: who may speak, how much, and for how long nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

from msfusion.engines.grpc.frames import (
    LARGEST_HELLO,
    METHOD,
    Done,
    Examples,
    Failed,
    Goodbye,
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
from msfusion.engines.grpc.listening import Listening
from msfusion.engines.grpc.messages import LARGEST_FRAME, Gathering, pieces_of
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.engines.grpc.places import Job, Places
from msfusion.errors import MsfusionError, StreamError

if TYPE_CHECKING:
    import grpc
    import grpc.aio

    Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]

HELLO_SECONDS = 15.0
"""How long somebody may be connected without saying who it is."""

PIECE_SECONDS = 120.0
"""How long a piece of a message may take, in both directions."""

IDLE_SECONDS = 10
"""How long somebody may be connected without a stream."""

PORT_SECONDS = 2.0
"""How long a port may be taken before we give up."""

KEEPALIVE_SECONDS = 20
"""After so long without a word, and so long again without an echo, a connection is taken for broken."""


class Service:
    """The gRPC server, in the event loop of its thread."""

    def __init__(self, places: Places, participants: int, listening: Listening) -> None:
        import grpc.aio

        self._places, self._listening = places, listening
        self._say: Callable[[str], None] = listening.on_event
        self._server = grpc.aio.server(
            options=_options(participants), maximum_concurrent_rpcs=2 * participants + 8
        )

    async def start(self) -> str:
        """Listen; the address, with the port that was found for port 0. Raises StreamError where that is taken."""
        import grpc

        service, method = METHOD.removeprefix("/").split("/")
        handler = grpc.stream_stream_rpc_method_handler(self._stream)
        handlers = grpc.method_handlers_generic_handler(service, {method: handler})
        self._server.add_generic_rpc_handlers((handlers,))
        port = await self._port()
        await self._server.start()
        return f"{self._listening.address.rpartition(':')[0]}:{port}"

    async def _port(self) -> int:
        """A server that was just killed may need a moment to let go of its port."""
        address, access = self._listening.address, self._listening.access
        end = time.monotonic() + PORT_SECONDS
        while True:
            try:
                if access.is_plain:
                    return int(self._server.add_insecure_port(address))
                return int(self._server.add_secure_port(address, access.server_credentials()))
            except RuntimeError:
                if time.monotonic() > end:
                    raise StreamError(
                        f"nothing can listen on {address}: is the port taken, and the host this one?"
                    ) from None
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """End all streams, after a moment in which they can end by themselves."""
        await self._server.stop(grace=2.0)

    async def _stream(self, _: Any, context: Context) -> None:
        """One stream, from its first word to its last."""
        import grpc

        try:
            self._check_token(context)
            await self._conversation(context)
        except MsfusionError as error:
            status = error.status if isinstance(error, StreamError) else "INVALID_ARGUMENT"
            self._say(f"{context.peer()}: {error} ({status})")
            context.set_code(grpc.StatusCode[status])  # abort would leave some bytes behind each time
            context.set_details(str(error)[:1000])

    def _check_token(self, context: Context, participant: int | None = None) -> None:
        """Raises StreamError where the token or certificate is wrong, or the token has been withdrawn meanwhile."""
        access = self._listening.access
        access.check_token(context.invocation_metadata(), participant)
        if participant is not None:
            access.check_certificate(context.auth_context().get("x509_common_name", ()), participant)

    async def _conversation(self, context: Context) -> None:
        """Who it is, then question and answer in turns."""
        data = await _read(context, HELLO_SECONDS)
        if data is None:
            return
        if len(data) > LARGEST_HELLO:
            raise StreamError(f"the first message has {len(data)} bytes, more than {LARGEST_HELLO}")
        hello = unpack(data, Hello)
        self._check_token(context, hello.participant)
        who, task, evicted = hello.participant, asyncio.current_task(), list[StreamError]()

        def evict(error: StreamError) -> None:
            evicted.append(error)
            assert task is not None
            task.cancel()

        self._places.take(hello, evict)
        self._say(f"participant {who} has come from {context.peer()}")
        try:
            await _write(context, pack(Welcome(self._places.rounds_kept)))
            while await self._answered(context, who):
                pass
        except asyncio.CancelledError:
            if evicted:
                raise evicted[0] from None
            raise
        finally:
            self._places.leave(who, evict)
            self._say(f"participant {who} has {'finished' if self._places.knows(who) else 'gone'}")

    async def _answered(self, context: Context, who: int) -> bool:
        """Answer what a participant says next; whether it may say more. Training takes as long as it takes."""
        data = await _read(context, None)
        if data is None:
            return False
        self._check_token(context, who)
        asked: HowMany | Ready | Done | Failed | Say | Goodbye
        asked = unpack(data, HowMany, Ready, Done, Failed, Say, Goodbye)
        if isinstance(asked, HowMany):
            await _write(context, pack(Examples(await self._places.examples_of_all())))
            return True
        if isinstance(asked, Goodbye):
            self._places.goodbye(who)
            return False
        if isinstance(asked, Ready):
            await self._hand_out(context, who)
            return True
        job = self._places.job_of(who, asked.work)
        if job is not None and isinstance(asked, Say):
            await self._respond(context, who, asked, job)
            return True
        if job is not None and isinstance(asked, Done):
            update = await self._gathered(context, who, job.work, asked.size, job.largest)
            self._places.done(who, asked.work, update)
        elif isinstance(asked, Failed):
            self._places.done(who, asked.work, None)
        await _write(context, pack(Thanks()))
        return True

    async def _respond(self, context: Context, who: int, asked: Say, job: Job) -> None:
        """Answer a request in the middle of a task, unless it was answered before."""
        if self._places.wants(who, asked.step):
            request = await self._gathered(context, who, job.work, asked.size, job.largest_request)
            self._places.say(who, job.work, request)
        response = await self._places.response(who, job.work, asked.step)
        if isinstance(response, str):
            await _write(context, pack(Unanswered(response[:1000])))
            return
        await _write(context, pack(Reply(asked.step, len(response))))
        for piece in pieces_of(response):
            await _write(context, piece)

    async def _hand_out(self, context: Context, who: int) -> None:
        """What is to be done next, once there is something."""
        job = await self._places.next(who)
        self._check_token(context, who)
        if job is None:
            await _write(context, pack(Over(self._places.rounds)))
            return
        answered = self._places.answered(who)
        await _write(context, pack(Work(job.work, len(job.task), job.kept, answered)))
        for piece in pieces_of(job.task):
            await _write(context, piece)

    async def _gathered(self, context: Context, who: int, work: bytes, size: int, most: int) -> bytes:
        """The update, or the request, that a participant has for a job. Raises StreamError."""
        try:
            gathering = Gathering(size, most)
            await _write(context, pack(Send()))
            while gathering.missing:
                piece = await _read(context, PIECE_SECONDS)
                if piece is None:
                    raise StreamError("the stream ended in the middle of a message", "ABORTED")
                gathering.add(piece)
        except StreamError as error:
            if error.status == "INVALID_ARGUMENT":  # otherwise it can send it again
                self._places.refuse(who, work, error)
            raise
        return gathering.message()


async def _write(context: Context, answer: bytes) -> None:
    async with _within(PIECE_SECONDS):
        await context.write(answer)


async def _read(context: Context, seconds: float | None) -> bytes | None:
    """The next message; None where the participant has said its last."""
    if seconds is None:
        message = await context.read()
    else:
        async with _within(seconds):
            message = await context.read()
    return message if isinstance(message, bytes) else None


@asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise StreamError(
            f"nothing was heard for {seconds:g} seconds; connect again to go on", "DEADLINE_EXCEEDED"
        ) from None


def _options(participants: int) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # two servers on one port would each get half of the participants
        ("grpc.max_receive_message_length", LARGEST_FRAME),
        ("grpc.max_send_message_length", LARGEST_FRAME),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: what is sent small must not grow here
        ("grpc.max_concurrent_streams", participants + 8),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.max_connection_idle_ms", 1000 * IDLE_SECONDS),
        ("grpc.keepalive_time_ms", 1000 * KEEPALIVE_SECONDS),
        ("grpc.keepalive_timeout_ms", 1000 * KEEPALIVE_SECONDS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # participants send pings too
    ]
