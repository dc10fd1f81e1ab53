"""What was answered in the middle of a task, kept for participants that come back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO


class Responses:
    """The responses to a participant's requests as messages, on the disk.

    The newest are in memory until `save`: they can be sent before the disk has them. There is a file only while
    something is in it: whoever asks nothing takes none.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._file: IO[bytes] | None = None
        self._ends = [0]
        self._newest: list[bytes] = []

    def __len__(self) -> int:
        return len(self._ends) - 1 + len(self._newest)

    def append(self, response: bytes) -> None:
        """Keep the response to the next request."""
        self._newest.append(response)

    def save(self) -> None:
        """Write the newest to the disk, if they are not there. Raises OSError; it can be called again then."""
        while self._newest:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115  # until clear
            rest, end = memoryview(self._newest[0]), self._ends[-1]
            while rest:
                written = os.pwrite(self._file.fileno(), rest, end)
                rest, end = rest[written:], end + written
            self._ends.append(end)
            del self._newest[0]

    def __getitem__(self, step: int) -> bytes:
        if step >= len(self._ends) - 1:
            return self._newest[step - len(self._ends) + 1]
        assert self._file is not None
        begin, end = self._ends[step], self._ends[step + 1]
        return os.pread(self._file.fileno(), end - begin, begin)

    def clear(self) -> None:
        """Forget them, and give the space back."""
        self._ends, self._newest = [0], []
        if self._file is not None:
            self._file.close()
            self._file = None
