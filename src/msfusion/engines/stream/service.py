"""The streams on the server: who may speak, how much, and for how long nothing; what is said goes to the desk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from msfusion.engines.grpc.access import METHOD, Access
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.engines.stream.desk import Asked, Desk
from msfusion.engines.stream.frames import LARGEST_HELLO, Again, Begin, Finish, Goodbye, Hello, Step, Welcome
from msfusion.engines.stream.terms import Terms
from msfusion.errors import MsfusionError, StreamError

if TYPE_CHECKING:
    import grpc
    import grpc.aio

HELLO_SECONDS = 15.0
"""How long somebody may be connected without saying who it is."""

PORT_SECONDS = 2.0
"""How long a port may be taken before we give up."""

KEEPALIVE_SECONDS = 20
"""After so long without a word, and so long again without an echo, a connection is taken for broken."""


class Service:
    """The gRPC server, in the event loop of the process of the streams.

    `say` is told what happens to connections.
    """

    def __init__(
        self, desk: Desk, address: str, access: Access, deadline: float, say: Callable[[str], None]
    ) -> None:
        import grpc.aio

        self._desk, self._address, self._access = desk, address, access
        self._deadline, self._say = deadline, say
        self._server = grpc.aio.server(
            options=_options(desk.terms),
            maximum_concurrent_rpcs=2 * desk.terms.participants + 8,
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
        return f"{self._address.rpartition(':')[0]}:{port}"

    async def _port(self) -> int:
        """The streams of a server that was just killed may need a moment to let go of its port."""
        end = time.monotonic() + PORT_SECONDS
        while True:
            try:
                if self._access.is_plain:
                    return int(self._server.add_insecure_port(self._address))
                return int(self._server.add_secure_port(self._address, self._access.server_credentials()))
            except RuntimeError:
                if time.monotonic() > end:
                    raise StreamError(
                        f"nothing can listen on {self._address}: is the port taken, and the host this one?"
                    ) from None
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """End all streams, after a moment in which they can end by themselves."""
        await self._server.stop(grace=2.0)

    async def _stream(self, _: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """One stream, from its first word to its last."""
        import grpc

        try:
            if not self._access.admits(context.invocation_metadata()):
                raise StreamError("the token is missing or wrong", "UNAUTHENTICATED")
            await self._conversation(context)
        except MsfusionError as error:
            status = error.status if isinstance(error, StreamError) else "INVALID_ARGUMENT"
            self._say(f"{context.peer()}: {error} ({status})")
            context.set_code(grpc.StatusCode[status])  # abort would leave some bytes behind each time
            context.set_details(str(error)[:1000])

    async def _conversation(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Question and answer, in turns."""
        data = await self._read(context, HELLO_SECONDS)
        if data is None:
            return
        if len(data) > LARGEST_HELLO:
            raise StreamError(f"the first message has {len(data)} bytes, more than {LARGEST_HELLO}")
        hello = unpack(data, Hello)
        who, task, evicted = hello.participant, asyncio.current_task(), list[StreamError]()

        def evict(error: StreamError) -> None:
            evicted.append(error)
            assert task is not None
            task.cancel()

        resumes = self._desk.sit(hello, evict)
        self._say(f"participant {who} has come from {context.peer()}")
        try:
            await self._write(context, pack(Welcome(resumes)))
            while (data := await self._read(context, self._deadline)) is not None:
                asked: Asked | Goodbye = unpack(data, Begin, Again, Step, Finish, Goodbye)
                if isinstance(asked, Goodbye):
                    self._desk.goodbye(who)
                    return
                await self._write(context, await self._desk.ask(who, asked, data))
        except asyncio.CancelledError:
            if evicted:
                raise evicted[0] from None
            raise
        finally:
            self._desk.leave(who, evict)
            self._say(f"participant {who} has gone")

    async def _write(self, context: grpc.aio.ServicerContext[bytes, bytes], answer: bytes) -> None:
        async with _within(self._deadline):
            await context.write(answer)

    async def _read(self, context: grpc.aio.ServicerContext[bytes, bytes], seconds: float) -> bytes | None:
        """The next message; None where the participant has said its last."""
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


def _options(terms: Terms) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # two servers on one port would each get half of the participants
        ("grpc.max_receive_message_length", terms.largest_up),
        ("grpc.max_send_message_length", terms.largest_down),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: what is sent small must not grow here
        ("grpc.max_concurrent_streams", terms.participants + 8),
        ("grpc.server_handshake_timeout_ms", 10_000),
        ("grpc.keepalive_time_ms", 1000 * KEEPALIVE_SECONDS),
        ("grpc.keepalive_timeout_ms", 1000 * KEEPALIVE_SECONDS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # participants send pings too
    ]
