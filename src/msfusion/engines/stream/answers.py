"""What was answered in a round, kept for participants that come back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class Answers:
    """The packed answers to a participant's steps in a round, on the disk."""

    def __init__(self, directory: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  # lives as long as we do
        self._ends = [0]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, answer: bytes) -> None:
        """Keep the answer to the next step."""
        rest = memoryview(answer)
        while rest:
            rest = rest[os.pwrite(self._file.fileno(), rest, self._ends[-1] + len(answer) - len(rest)) :]
        self._ends.append(self._ends[-1] + len(answer))

    def __getitem__(self, step: int) -> bytes:
        begin, end = self._ends[step], self._ends[step + 1]
        return os.pread(self._file.fileno(), end - begin, begin)

    def close(self) -> None:
        """Give the space back."""
        self._file.close()

    def clear(self) -> None:
        """Forget them."""
        self._ends = [0]
        os.ftruncate(self._file.fileno(), 0)
