"""What a participant keeps between its rounds: in the context that Flower keeps for it, or in files of its own.

A context lasts for one run of one SuperNode. Files outlast both, so a run that goes on after a killed SuperLink, or a
SuperNode that is started again, needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from msfusion.engines.grpc.kept import Kept
from msfusion.engines.grpc.messages import read
from msfusion.federated.messages import encode


@contextmanager
def keeping(memory: dict[int, bytes], folder: Path | None, run: str, rounds: int) -> Iterator[Kept]:
    """What a participant keeps, to be loaded and saved; `run` is a digest of the run and the participant.

    Without a folder it lies in `memory`, by round, which is written anew at the end. Raises RunDirectoryError as `Kept`
    does, StreamError for a memory that is damaged.
    """
    if folder is not None:
        yield Kept(folder, run, rounds)
        return
    memories = _of_run(memory, run)
    # a context cannot outlive the run, which never goes back while it lasts: one that is older is of no use
    yield Kept(None, run, 0, memories)
    memory.clear()
    memory.update({number: encode({"run": run}, tensors) for number, tensors in memories.items()})


def _of_run(memory: dict[int, bytes], run: str) -> dict[int, dict[str, Tensor]]:
    """By round, what was kept in this run. What others have left is let be."""
    found = {number: read(content) for number, content in memory.items()}
    return {number: tensors for number, (header, tensors) in found.items() if header.get("run") == run}
