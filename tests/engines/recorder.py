"""Everything that crosses between the server and its workers, as bytes; and a search in it for private tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msfusion.engines import machine
from msfusion.engines.processes import Processes

WINDOW = 16
"""How many neighbouring bytes of a private tensor are looked for: eight numbers of 16 bits, four of 32, two of 64."""


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

        class RecordingProcesses(Processes):
            def _start(self, *work: Any) -> None:
                super()._start(*work)
                worker: Any = self._workers[-1]
                worker.connection = Recording(worker.connection, recorded.wire)
                worker.shelf = Recording(worker.shelf, recorded.shelves)

        monkeypatch.setattr(machine, "Processes", RecordingProcesses)


DISGUISES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The types in which a private tensor is looked for, beside its own."""


def found(messages: Iterable[bytes], tensors: Sequence[Tensor]) -> list[int]:
    """Which of the tensors stand in the messages, whole or in part: by any telling window of neighbouring numbers,
    also of the transposed tensor and of other types.
    """
    windows: dict[bytes, set[int]] = {}  # equal layers have the same
    for index, tensor in enumerate(tensors):
        for disguise in disguises(tensor):
            for window in telling(disguise):
                windows.setdefault(window, set()).add(index)
    assert windows
    return sorted(
        set().union(*(windows.get(piece, ()) for message in messages for piece in _pieces(message)))
    )


def disguises(tensor: Tensor) -> list[Tensor]:
    """The tensor and what it could be sent as instead: with its first two axes exchanged, in other types."""
    layouts = [tensor, tensor.transpose(0, 1)] if tensor.ndim > 1 else [tensor]
    return [layout.to(dtype) for layout in layouts for dtype in {tensor.dtype, *DISGUISES}]


def telling(tensor: Tensor) -> set[bytes]:
    """The windows of a tensor in which no two numbers are equal: zeros, ones and paddings are nobody's secret."""
    values = tensor.detach().contiguous()
    if values.dtype == torch.bfloat16:  # which NumPy does not know
        values = values.view(torch.int16)
    numbers = values.numpy().reshape(-1)
    size = numbers.itemsize
    count = WINDOW // size
    if len(numbers) < count:
        return set()
    windows = np.lib.stride_tricks.sliding_window_view(numbers, count)
    ordered = np.sort(windows, axis=1)
    return {window.tobytes() for window in windows[(np.diff(ordered, axis=1) != 0).all(1)]}


def _pieces(message: bytes) -> Iterable[bytes]:
    """All windows of a message; in a safetensors file numbers begin at multiples of their size, at least two bytes."""
    return (message[start : start + WINDOW] for start in range(0, len(message) - WINDOW + 1, 2))
