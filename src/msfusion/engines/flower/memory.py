"""What a participant keeps between its rounds: in the context that Flower keeps for it, or in files of its own.

A context lasts for one run of one SuperNode. Files outlast both, so a run that goes on after a killed SuperLink, or a
SuperNode that is started again, needs them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr.app import RecordDict
from torch import Tensor

from msfusion.engines.flower.records import raw_in, raw_record
from msfusion.engines.grpc.kept import Kept
from msfusion.engines.grpc.messages import read
from msfusion.federated.messages import encode

_NAME = re.compile(r"msfusion\.kept\.(\d{1,9})")


@contextmanager
def kept_in(state: RecordDict, folder: Path | None, run: str, rounds: int) -> Iterator[Kept]:
    """What a participant keeps, to be loaded and saved; `run` is a digest of the run and the participant.

    Without a folder it lies in `state`, which is written anew at the end. Raises RunDirectoryError as `Kept` does.
    """
    if folder is not None:
        yield Kept(folder, run, rounds)
        return
    # a context cannot outlive the run, which never goes back while it lasts: one that is older is of no use
    memories = _memories_in(state, run)
    yield Kept(None, run, 0, memories)
    for name in [name for name in state if _NAME.fullmatch(name)]:
        del state[name]
    for number, memory in memories.items():
        state[f"msfusion.kept.{number}"] = raw_record(encode({"run": run}, memory))


def _memories_in(state: RecordDict, run: str) -> dict[int, dict[str, Tensor]]:
    """By round, what was kept in this run. What others have left is let be."""
    memories: dict[int, dict[str, Tensor]] = {}
    for name in state:
        if found := _NAME.fullmatch(name):
            header, tensors = read(raw_in(state[name]))
            if header.get("run") == run:
                memories[int(found[1])] = tensors
    return memories
