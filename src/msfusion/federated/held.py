"""The updates of a round, kept until all are there: in memory, and from some size on in a temporary file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO

from msfusion.errors import TrainingError
from msfusion.federated.messages import decode, encoded_update, update_of
from msfusion.federated.method import Update
from msfusion.federated.states import payload_bytes

IN_MEMORY = 2**30
"""The bytes of updates that are kept in memory; the rest of a round's goes to the disk, where temporary files are."""


@dataclass(frozen=True)
class _OnDisk:
    """Where an update stands in the file, and the share of it that counts."""

    begin: int
    size: int
    share: float


class Held:
    """Updates by participant. At most `in_memory` bytes of them are in memory, and one more while it is read."""

    def __init__(self, in_memory: int = IN_MEMORY) -> None:
        self._updates: dict[int, Update | _OnDisk] = {}
        self._room = in_memory
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._updates)

    def add(self, update: Update) -> None:
        """Keep copies of a participant's tensors: its own may be overwritten by the next participant's.

        Raises TrainingError where the disk is full.
        """
        size = payload_bytes(update.tensors)
        if size > self._room:
            self._updates[update.participant] = self._written(update)
            return
        self._room -= size
        tensors = {name: tensor.clone() for name, tensor in update.tensors.items()}
        self._updates[update.participant] = replace(update, tensors=tensors)

    def drop(self, participant: int) -> None:
        """Forget a participant's update, if there is one."""
        self._updates.pop(participant, None)

    def updates(self) -> Iterator[Update]:
        """All updates, by the participants' numbers; can be asked for again."""
        for _, update in sorted(self._updates.items()):
            yield self._read(update) if isinstance(update, _OnDisk) else update

    def close(self) -> None:
        """Let go of all."""
        self._updates.clear()
        if self._file is not None:
            self._file.close()

    def _written(self, update: Update) -> _OnDisk:
        message = encoded_update(update, 0.0)
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # lives as long as we do
            begin = self._file.seek(0, 2)
            rest = memoryview(message)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise TrainingError(
                f"a round's updates cannot be kept in {tempfile.gettempdir()} ({error.strerror}): "
                "set TMPDIR to a larger disk, or let fewer participants take part in a round"
            ) from error
        return _OnDisk(begin, len(message), update.share)

    def _read(self, place: _OnDisk) -> Update:
        assert self._file is not None
        self._file.seek(place.begin)
        parts, missing = [], place.size
        while missing:
            parts.append(self._file.read(missing))
            missing -= len(parts[-1])
        update, *_ = update_of(*decode(b"".join(parts)))
        return replace(update, share=place.share)
