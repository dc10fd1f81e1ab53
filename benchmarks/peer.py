"""A peer of a server that says what it likes: what hostile participants and strangers are made of."""

from __future__ import annotations

import queue
from typing import Any

from msfusion.engines.grpc.access import Access
from msfusion.engines.grpc.frames import METHOD
from msfusion.engines.grpc.packing import pack, unpack


class Peer:
    """A stream on which anything may be said."""

    def __init__(self, address: str, access: Access, seconds: float) -> None:
        self._said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._channel = access.channel(address, [("grpc.use_local_subchannel_pool", 1)])
        stream = self._channel.stream_stream(METHOD)
        self._answers = stream(iter(self._said.get, None), metadata=access.metadata, timeout=seconds)

    def say(self, *said: object) -> None:
        """Say frames, or any bytes, without waiting for answers."""
        for each in said:
            self._said.put(each if isinstance(each, bytes) else pack(each))

    def heard(self, *kinds: type[Any]) -> Any:
        """The next answer. Raises grpc.RpcError where the stream has ended."""
        return unpack(self.piece(), *kinds)

    def piece(self) -> bytes:
        """The next answer as it comes. Raises grpc.RpcError where the stream has ended."""
        answer: bytes = next(self._answers)
        return answer

    def close(self) -> None:
        """Go, without a word."""
        self._answers.cancel()
        self._said.put(None)
        self._channel.close()
