"""What a participant keeps on its own machine between rounds, such as remembered logits.

Each round's is a file of its own, or stays in memory where no folder was given. The server may go back some rounds when
it is started again, so what it may go back to stays: the files of as many rounds as lie between two of its checkpoints,
and the newest from before. (A participant that was not asked for a while goes on from that one.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from msfusion.errors import MsfusionError, RunDirectoryError
from msfusion.federated.messages import update_message
from msfusion.federated.method import Kind, Released, Task
from msfusion.files import (
    read_metadata,
    read_tensors,
    refusing_write_errors,
    remove_unfinished,
    write_tensors,
)
from msfusion.scoring import loss_told
from msfusion.width.groups import State

FILES = f"kept-{'[0-9]' * 6}.safetensors"

ALL = 2**63
"""As many rounds as there can be."""


class Kept:
    """What one participant keeps, by the number of the round, from 1. `run` is a digest of the run and the participant.

    `rounds` is how far the server may go back, as it says itself when it is met: until then nothing is forgotten.
    `in_memory` is where it is kept, and what was kept before, where there is no folder.
    Raises RunDirectoryError where the folder has files of another run or participant, or cannot be written.
    """

    def __init__(
        self,
        folder: Path | None,
        run: str,
        rounds: int = ALL,
        in_memory: dict[int, dict[str, Tensor]] | None = None,
    ) -> None:
        self._folder, self._run, self.rounds = folder, run, rounds
        self._in_memory = {} if in_memory is None else in_memory
        if folder is not None:
            with refusing_write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                remove_unfinished(folder)  # which a killed process was writing
            for path in folder.glob(FILES):
                self._check(path, read_metadata(path))

    def save(self, number: int, memory: State) -> None:
        """Keep this, before the server hears that the round's work is done."""
        if self._folder is None:
            self._in_memory[number] = {name: tensor.clone() for name, tensor in memory.items()}
        else:
            write_tensors(self._path(number), memory, {"run": self._run}, private=True)

    def load(self, number: int, first: Callable[[], State] = dict) -> Mapping[str, Tensor]:
        """What was kept in that round, and for 0 what the participant began with, which `first` makes once.

        So a participant that is killed in its first round begins again with the same. Raises RunDirectoryError where
        it is not here.
        """
        if number == 0 and 0 not in self._numbers():
            if made := first():
                self.save(0, made)
            return made
        found = self._found(number)
        self._forget_before(number - self.rounds)
        return found

    def _check(self, path: Path, metadata: Mapping[str, Any]) -> None:
        if metadata.get("run") != self._run:
            raise RunDirectoryError(
                f"{path} is of another run, or another participant's: choose another --out"
            )

    def _found(self, number: int) -> Mapping[str, Tensor]:
        if self._folder is None:
            if number not in self._in_memory:
                raise RunDirectoryError(
                    f"what this participant kept in round {number} was in the memory of another process: "
                    "begin the run anew, with --out for its participants"
                )
            return self._in_memory[number]
        path = self._path(number)
        if not path.is_file():
            raise RunDirectoryError(
                f"what this participant kept in round {number} is not in {self._folder}: start it with the "
                "--out that it had"
            )
        tensors, metadata = read_tensors(path)
        self._check(path, metadata)
        return tensors

    def clear(self) -> None:
        """All rounds are done: nobody goes on from here."""
        self._forget(self._numbers())

    def _forget_before(self, number: int) -> None:
        """Forget what is older than the newest that was kept in this round or before."""
        older = [each for each in self._numbers() if each <= number]
        self._forget(older[:-1])

    def _numbers(self) -> list[int]:
        """The rounds of which something is kept, the oldest first."""
        if self._folder is None:
            return sorted(self._in_memory)
        return sorted(int(path.stem.removeprefix("kept-")) for path in self._folder.glob(FILES))

    def _forget(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._in_memory.pop(number, None)
            if self._folder is not None:
                with suppress(OSError):
                    self._path(number).unlink()

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"kept-{number:06d}.safetensors"


def sent_of(
    kind: Kind,
    task: Task,
    answer: Released | MsfusionError,
    seconds: float,
    examples: int,
    kept: Kept,
    tell: Callable[[str], None],
    tells_losses: bool = True,
) -> bytes | None:
    """What is sent of a task that is done, an update as a message; None where the participant could not do it.

    What it is to keep is kept, where nobody else may read it; `tell` is told how it went, on the participant's machine
    alone.
    """
    where = f"round {task.round_index + 1}"
    if isinstance(answer, MsfusionError):
        tell(f"{where}: {answer}")
        return None
    if answer.memory:
        kept.save(task.round_index + 1, answer.memory)
    loss = f"loss {loss_told(answer.loss)}, " if tells_losses else ""
    figures = f"{examples} examples, {loss}{seconds:.2f} s"
    tell(f"{where}: {figures if kind == 'train' else kind}")
    return update_message(answer, seconds)
