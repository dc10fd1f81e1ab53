"""What a participant keeps on its own machine between rounds, such as remembered logits.

Each round's is a file of its own, or stays in memory where no folder was given. The server may go back some rounds when
it is started again, so the files of as many rounds stay as lie between two of its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from msfusion.errors import RunDirectoryError
from msfusion.files import read_tensors, refusing_write_errors, remove_unfinished, write_tensors
from msfusion.width.groups import State


class Kept:
    """What one participant keeps, by the number of the round, from 1. `run` is a digest of the run.

    Files of another run are refused. Raises RunDirectoryError where the folder cannot be written.
    """

    def __init__(self, folder: Path | None, run: str, rounds: int) -> None:
        self._folder, self._run, self._rounds = folder, run, rounds
        self._in_memory: dict[int, dict[str, Tensor]] = {}
        if folder is not None:
            with refusing_write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                remove_unfinished(folder)  # which a killed process was writing

    def save(self, number: int, memory: State) -> None:
        """Keep this, before the server hears that the round's work is done."""
        if self._folder is None:
            self._in_memory[number] = {name: tensor.clone() for name, tensor in memory.items()}
        else:
            write_tensors(self._path(number), memory, {"run": self._run})

    def load(self, number: int) -> Mapping[str, Tensor]:
        """What was kept in that round; nothing for 0. Raises RunDirectoryError where it is not here."""
        if number == 0:
            return {}
        found = self._found(number)
        self._forget_before(number - self._rounds)
        return found

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
        if metadata.get("run") != self._run:
            raise RunDirectoryError(f"{path} is of another run: choose another --out")
        return tensors

    def clear(self) -> None:
        """All rounds are done: nobody goes on from here."""
        self._forget_before(None)

    def _forget_before(self, number: int | None) -> None:
        """Forget what was kept before a round; with None, everything."""
        for each in [each for each in self._in_memory if number is None or each < number]:
            del self._in_memory[each]
        if self._folder is not None:
            for path in self._folder.glob("kept-*.safetensors"):
                with suppress(ValueError, OSError):
                    if number is None or int(path.stem.removeprefix("kept-")) < number:
                        path.unlink()

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"kept-{number:06d}.safetensors"
