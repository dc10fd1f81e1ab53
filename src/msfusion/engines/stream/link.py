"""What the two processes of a server say to each other: calls, each a name and its values.

On the socket that joins them: two lengths, then name and values as msgpack, then the last value as it is where that
is bytes, for these are many. Nobody waits for the result of a call: where one is due, the other side calls back.
"""

from __future__ import annotations

import asyncio
import selectors
import socket
import struct
from typing import Any

Call = tuple[str, list[Any]]
"""The name of what is called, and its values."""

_LENGTHS = struct.Struct("<Iq")
_NONE = -1


class Link:
    """The end of the process that trains: whoever listens here waits."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)

    def tell(self, name: str, *values: Any) -> None:
        """Raises OSError where nobody listens any more."""
        parts = [memoryview(part) for part in _packed(name, values)]
        sent = self._connection.sendmsg(parts)
        for part in parts:
            if sent < len(part):
                self._connection.sendall(part[sent:])
            sent = max(0, sent - len(part))

    def heard(self, seconds: float | None = None) -> Call:
        """The next call, however long it takes, or within some seconds.

        Raises TimeoutError, and EOFError or OSError where nobody speaks any more.
        """
        if seconds is not None and not self._selector.select(max(0.0, seconds)):
            raise TimeoutError
        head, data = _LENGTHS.unpack(self._read(_LENGTHS.size))
        return _unpacked(self._read(head), None if data == _NONE else self._read(data))

    def _read(self, size: int) -> bytes:
        found = self._connection.recv(size, socket.MSG_WAITALL)
        if len(found) == size:
            return found
        rest = bytearray(found)  # a signal came between
        while len(rest) < size:
            found = self._connection.recv(size - len(rest))
            if not found:
                raise EOFError
            rest += found
        return bytes(rest)

    def close(self) -> None:
        """The other side hears that nobody is here."""
        self._selector.close()
        self._connection.close()


class LoopLink:
    """The end of the process of the streams, in its event loop."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection, self._loop = connection, asyncio.get_running_loop()
        self._unsent = bytearray()

    @property
    def waiting(self) -> int:
        """The bytes of calls that the other side has not taken yet."""
        return len(self._unsent)

    def tell(self, name: str, *values: Any) -> None:
        """Never waits; what nobody hears is lost."""
        parts = _packed(name, values)
        sent = 0 if self._unsent else self._sent(*parts)
        if sent < sum(map(len, parts)):
            self._unsent += b"".join(parts)[sent:]
            self._loop.add_writer(self._connection, self._send_rest)

    def _send_rest(self) -> None:
        del self._unsent[: self._sent(self._unsent)]
        if not self._unsent:
            self._loop.remove_writer(self._connection)

    def _sent(self, *parts: bytes | bytearray) -> int:
        """How much of it could be sent without waiting."""
        try:
            return self._connection.sendmsg(parts)
        except BlockingIOError:
            return 0
        except OSError:  # nobody is there any more: `heard` tells it
            return sum(map(len, parts))

    async def heard(self) -> Call:
        """The next call. Raises EOFError or OSError where nobody speaks any more."""
        head, data = _LENGTHS.unpack(await self._read(_LENGTHS.size))
        start = await self._read(head)
        return _unpacked(start, None if data == _NONE else await self._read(data))

    async def _read(self, size: int) -> bytes:
        found = await self._loop.sock_recv(self._connection, size)
        if len(found) == size:
            return found
        rest = bytearray(found)
        while len(rest) < size:
            found = await self._loop.sock_recv(self._connection, size - len(rest))
            if not found:
                raise EOFError
            rest += found
        return bytes(rest)


def _packed(name: str, values: tuple[Any, ...]) -> tuple[bytes, ...]:
    import msgpack

    if values and isinstance(values[-1], bytes):
        head = msgpack.packb([name, *values[:-1]])
        return _LENGTHS.pack(len(head), len(values[-1])) + head, values[-1]
    head = msgpack.packb([name, *values])
    return (_LENGTHS.pack(len(head), _NONE) + head,)


def _unpacked(head: bytes, data: bytes | None) -> Call:
    import msgpack

    name, *values = msgpack.unpackb(head)
    return name, values if data is None else [*values, data]
