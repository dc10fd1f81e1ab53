"""Everything that crosses between the server and its workers, as bytes; and a search in it for private tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from msfusion.engines import local
from msfusion.engines.pool import Pool

WINDOW = 16
"""How many neighbouring bytes of a private tensor are looked for: four numbers of 32 bits, two of 64."""


class Recording(Connection):
    """The server's end of a pipe, which notes every message in both directions. It takes the place of another."""

    def __init__(self, connection: Connection, messages: list[bytes]) -> None:
        super().__init__(os.dup(connection.fileno()))
        connection.close()
        self.messages = messages

    def send_bytes(self, message: bytes) -> None:  # type: ignore[override]
        self.messages.append(bytes(message))
        super().send_bytes(message)

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        self.messages.append(super().recv_bytes(maxlength))
        return self.messages[-1]


class Recorded:
    """What crossed in all rounds that were run since: `wire` between server and participants; `shelves` what
    participants keep for themselves.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wire: list[bytes] = []
        self.shelves: list[bytes] = []
        recorded = self

        class RecordingPool(Pool):
            def _start(self, *work: Any) -> None:
                super()._start(*work)
                worker: Any = self._workers[-1]
                worker.connection = Recording(worker.connection, recorded.wire)
                worker.shelf = Recording(worker.shelf, recorded.shelves)

        monkeypatch.setattr(local, "Pool", RecordingPool)


def found(messages: Iterable[bytes], tensors: Sequence[Tensor]) -> list[int]:
    """Which of the tensors stand in the messages, whole or in part: by any telling window of neighbouring numbers."""
    windows: dict[bytes, int] = {}
    for index, tensor in enumerate(tensors):
        windows |= dict.fromkeys(telling(tensor), index)
    assert windows
    return sorted({windows[piece] for message in messages for piece in _pieces(message) if piece in windows})


def telling(tensor: Tensor) -> set[bytes]:
    """The windows of a tensor in which no two numbers are equal: zeros, ones and paddings are nobody's secret."""
    numbers = tensor.detach().contiguous().numpy().reshape(-1)
    size = numbers.itemsize
    count = WINDOW // size
    if len(numbers) < count:
        return set()
    windows = np.lib.stride_tricks.sliding_window_view(numbers, count)
    ordered = np.sort(windows, axis=1)
    return {window.tobytes() for window in windows[(np.diff(ordered, axis=1) != 0).all(1)]}


def _pieces(message: bytes) -> Iterable[bytes]:
    """All windows of a message; in a safetensors file numbers begin at multiples of four bytes."""
    return (message[start : start + WINDOW] for start in range(0, len(message) - WINDOW + 1, 4))
