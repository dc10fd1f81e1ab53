"""What was answered in the middle of a task, kept for participants that come back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO


class Responses:
    """The responses to a participant's requests as messages, on the disk.

    The newest is in memory until `save`: it can be sent before the disk has it. There is a file only while something is
    in it: whoever asks nothing takes none.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._file: IO[bytes] | None = None
        self._ends = [0]
        self._newest: bytes | None = None

    def __len__(self) -> int:
        return len(self._ends) - 1 + (self._newest is not None)

    def append(self, response: bytes) -> None:
        """Keep the response to the next request. Raises OSError where the disk does not take the one before."""
        self.save()
        self._newest = response

    def save(self) -> None:
        """Write the newest to the disk, if it is not there. Raises OSError."""
        if self._newest is None:
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115  # until clear
        rest, end = memoryview(self._newest), self._ends[-1]
        while rest:
            written = os.pwrite(self._file.fileno(), rest, end)
            rest, end = rest[written:], end + written
        self._ends.append(end)
        self._newest = None

    def __getitem__(self, step: int) -> bytes:
        if self._newest is not None and step == len(self._ends) - 1:
            return self._newest
        assert self._file is not None
        begin, end = self._ends[step], self._ends[step + 1]
        return os.pread(self._file.fileno(), end - begin, begin)

    def clear(self) -> None:
        """Forget them, and give the space back."""
        self._ends, self._newest = [0], None
        if self._file is not None:
            self._file.close()
            self._file = None
