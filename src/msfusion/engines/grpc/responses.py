"""What was answered in the middle of a task, kept for participants that come back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class Responses:
    """The responses to a participant's requests as messages, on the disk.

    The newest is in memory until `save`: it can be sent before the disk has it.
    """

    def __init__(self, directory: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  # lives as long as we do
        self._ends = [0]
        self._newest: bytes | None = None

    def __len__(self) -> int:
        return len(self._ends) - 1 + (self._newest is not None)

    def append(self, response: bytes) -> None:
        """Keep the response to the next request."""
        self.save()
        self._newest = response

    def save(self) -> None:
        """Write the newest to the disk, if it is not there."""
        if self._newest is None:
            return
        rest, end = memoryview(self._newest), self._ends[-1]
        while rest:
            written = os.pwrite(self._file.fileno(), rest, end)
            rest, end = rest[written:], end + written
        self._ends.append(end)
        self._newest = None

    def __getitem__(self, step: int) -> bytes:
        if self._newest is not None and step == len(self._ends) - 1:
            return self._newest
        begin, end = self._ends[step], self._ends[step + 1]
        return os.pread(self._file.fileno(), end - begin, begin)

    def close(self) -> None:
        """Give the space back."""
        self._file.close()

    def clear(self) -> None:
        """Forget them."""
        self._ends, self._newest = [0], None
        os.ftruncate(self._file.fileno(), 0)
