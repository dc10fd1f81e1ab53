"""Bad links on this machine: a small TCP proxy for each participant, with a rate, a delay, and cuts.

TLS passes through it as it is. It runs in a thread with an event loop of its own.
"""

from __future__ import annotations

import asyncio
import math
import threading
from contextlib import suppress
from dataclasses import dataclass, field

PIECE = 2**14
"""The most bytes that are read at once."""

UNDER_WAY = 16
"""How many such pieces may be under way in one direction of a connection: the sender waits then."""


@dataclass
class Link:
    """A participant's link: bytes per second and seconds of delay, in each direction; what has crossed it."""

    rate: float = math.inf
    delay: float = 0.0
    port: int = 0
    cut: bool = False
    crossed: int = 0
    connections: set[asyncio.StreamWriter] = field(default_factory=set)
    free: dict[str, float] = field(default_factory=lambda: {"up": 0.0, "down": 0.0})


class Links:
    """All links to one server, in a `with`. The port of each is known once it is entered."""

    def __init__(self, server: tuple[str, int], links: list[Link]) -> None:
        self._server, self.links = server, links
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._listening = threading.Event()

    def __enter__(self) -> Links:
        self._thread.start()
        self._listening.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def cut(self, number: int) -> None:
        """Drop all connections of a participant, and take no new one until `join`."""
        self._loop.call_soon_threadsafe(self._cut, self.links[number])

    def join(self, number: int) -> None:
        """Take connections again."""
        self.links[number].cut = False

    def _cut(self, link: Link) -> None:
        link.cut = True
        for each in link.connections:
            each.transport.abort()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.set_exception_handler(lambda *_: None)  # a connection that is cut raises where it is read
        self._loop.run_until_complete(self._listen())
        self._listening.set()
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for each in tasks:
            each.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))

    async def _listen(self) -> None:
        for link in self.links:

            async def serve(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, link: Link = link
            ) -> None:
                await self._connection(link, reader, writer)

            server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=2 * PIECE)
            link.port = server.sockets[0].getsockname()[1]

    async def _connection(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One connection, until one of its ends closes it, or it is cut."""
        ends = [writer]
        link.connections.add(writer)
        try:
            if link.cut:
                return
            there, onward = await asyncio.open_connection(*self._server, limit=2 * PIECE)
            ends.append(onward)
            link.connections.add(onward)
            if link.cut:
                return
            pumps = [
                asyncio.create_task(self._pump(link, "up", reader, onward)),
                asyncio.create_task(self._pump(link, "down", there, writer)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for each in pumps:
                each.cancel()
        except OSError:
            pass  # the server is away: so is whoever connected
        finally:
            for each in ends:
                link.connections.discard(each)
                each.transport.abort()

    async def _pump(
        self, link: Link, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Carry what comes, each piece when the link is free for it, and after the delay."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(UNDER_WAY)
        delivering = asyncio.create_task(self._deliver(waiting, writer))
        try:
            with suppress(OSError):
                while data := await reader.read(PIECE):
                    begin = max(self._loop.time(), link.free[direction])
                    link.free[direction] = begin + len(data) / link.rate
                    link.crossed += len(data)
                    await waiting.put((link.free[direction] + link.delay, data))
                await waiting.put((link.free[direction] + link.delay, b""))
                await delivering
        finally:
            delivering.cancel()

    async def _deliver(
        self, waiting: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        while True:
            when, data = await waiting.get()
            if (left := when - self._loop.time()) > 0:
                await asyncio.sleep(left)
            if not data:
                return
            writer.write(data)
            await writer.drain()
