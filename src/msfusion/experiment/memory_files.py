"""What participants keep, in files beside the checkpoints that need it: written when it changes, not in each round.

A participant may remember 256 MB of logits, which stay as they are for as many rounds as a phase has. A checkpoint
that held them itself would write them anew in every round. So where what has changed is much, it goes into a file of
its own, `memory-<rounds>.safetensors`; this checkpoint and the next ones name that file, its digest, and which of its
tensors they mean. What is little, such as what a contrastive loss keeps of a small model, stays in the checkpoint.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from msfusion.errors import RunDirectoryError
from msfusion.federated.states import payload_bytes
from msfusion.files import Streamed, check_tensors, read_metadata, read_tensors, write_tensors, written_digest
from msfusion.width.groups import State

ENOUGH = 2**20
"""From so many bytes on, what has changed gets a file of its own."""

TOO_MUCH = 3
"""So many times as large as all that is remembered may be the files that have it, as each may have older things too."""

REFERENCES = "memories"
"""In a checkpoint's metadata, by the name of a file: its digest, and the names of the tensors that are meant."""

_NAME = re.compile(r"memory-\d{6,}\.safetensors")

References = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class _Place:
    """Where a tensor was written: as long as it lives, and nobody writes into it, the file has it."""

    tensor: weakref.ref[Tensor]
    version: int | None
    file: str
    digest: str


@dataclass(frozen=True)
class MemoryFiles:
    """The files in the folder of a run's checkpoints, and which tensors this process knows to be in them."""

    folder: Path
    _places: dict[str, _Place] = field(default_factory=dict)

    def save(self, rounds: int, remembered: State) -> tuple[dict[str, Tensor], References]:
        """Write what is in no file yet, of tensors by their names in a checkpoint.

        Returns what the checkpoint has to hold itself, as it is too little for a file, and what the checkpoint says of
        the rest. Raises RunDirectoryError.
        """
        new = {name: tensor for name, tensor in remembered.items() if not self._is_written(name, tensor)}
        if self._bytes_of_files(remembered.keys() - new.keys()) > TOO_MUCH * payload_bytes(remembered):
            new = dict(remembered)  # most of the files is what has changed since
        if payload_bytes(new) >= ENOUGH:
            path = self.folder / f"memory-{rounds:06d}.safetensors"
            write_tensors(path, new, {"rounds": rounds})
            self._note(new, path.name, written_digest(path))
            new = {}
        references: References = {}
        for name in sorted(remembered.keys() - new.keys()):
            place = self._places[name]
            entry = references.setdefault(place.file, {"sha256": place.digest, "names": []})
            entry["names"].append(name)
        return new, references

    def read(self, checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As `read_tensors`, with the tensors that stand in other files; they need not be written again.

        Raises RunDirectoryError where any of the files is missing, damaged, or of another checkpoint.
        """
        tensors, metadata = read_tensors(checkpoint)
        for path, entry in _named(checkpoint, metadata):
            found, _ = read_tensors(path)
            taken = {name: found[name] for name in _present(path, entry, found)}
            self._note(taken, path.name, entry["sha256"])
            tensors |= taken
        return tensors, metadata

    def remove_others(self, checkpoints: Iterable[Path]) -> None:
        """Delete the files that none of these checkpoints needs; none where one of them cannot be asked."""
        with suppress(RunDirectoryError):
            needed = {name for each in checkpoints for name in _references(each, read_metadata(each))}
            for path in self.folder.glob("memory-*.safetensors"):
                if path.name not in needed:
                    path.unlink(missing_ok=True)

    def _bytes_of_files(self, names: Iterable[str]) -> int:
        """How large the files are together in which these tensors stand."""
        return sum(
            (self.folder / file).stat().st_size for file in {self._places[name].file for name in names}
        )

    def _is_written(self, name: str, tensor: Tensor) -> bool:
        place = self._places.get(name)
        if place is None or place.tensor() is not tensor or place.version != _version(tensor):
            return False
        return (self.folder / place.file).is_file()  # somebody may have removed it

    def _note(self, tensors: State, file: str, digest: str) -> None:
        for name, tensor in tensors.items():
            self._places[name] = _Place(weakref.ref(tensor), _version(tensor), file, digest)


def check_with_memories(checkpoint: Path) -> tuple[Streamed, dict[str, Any]]:
    """As `check_tensors`, with the tensors that stand in other files.

    Raises RunDirectoryError where any of the files is missing, damaged, or of another checkpoint.
    """
    whole, metadata = check_tensors(checkpoint)
    parts = dict.fromkeys(whole.forms, whole)
    for path, entry in _named(checkpoint, metadata):
        found, _ = check_tensors(path)
        parts |= dict.fromkeys(_present(path, entry, found.forms), found)
    forms = {name: part.forms[name] for name, part in parts.items()}
    return Streamed(forms, lambda name: parts[name].read(name)), metadata


def _references(checkpoint: Path, metadata: Mapping[str, Any]) -> References:
    """What a checkpoint says of other files. Raises RunDirectoryError where it is not what `save` writes."""
    found = metadata.get(REFERENCES, {})
    if not isinstance(found, dict) or not all(
        _NAME.fullmatch(name) and _is_entry(found[name]) for name in found
    ):
        raise RunDirectoryError(f"{checkpoint} is damaged: it does not say which files have the rest of it.")
    return found


def _is_entry(entry: object) -> bool:
    """Whether this is what a checkpoint says of one file."""
    if not isinstance(entry, dict) or not isinstance(names := entry.get("names"), list):
        return False
    return isinstance(entry.get("sha256"), str) and all(isinstance(name, str) for name in names)


def _named(checkpoint: Path, metadata: Mapping[str, Any]) -> Iterable[tuple[Path, dict[str, Any]]]:
    """The files that a checkpoint names, and what it says of them. Raises RunDirectoryError where one is another."""
    for name, entry in _references(checkpoint, metadata).items():
        path = checkpoint.with_name(name)
        if written_digest(path) != entry["sha256"]:
            raise RunDirectoryError(f"{path} is not the file that {checkpoint.name} was written with.")
        yield path, entry


def _present(path: Path, entry: Mapping[str, Any], found: Mapping[str, object]) -> list[str]:
    """The names that are meant of a file. Raises RunDirectoryError where it has not all of them."""
    missing = [name for name in entry["names"] if name not in found]
    if missing:
        raise RunDirectoryError(f"{path} has no tensor {missing[0]!r}.")
    return list(entry["names"])


def _version(tensor: Tensor) -> int | None:
    """Another one after each writing into the tensor; an inference tensor counts none."""
    return None if tensor.is_inference() else tensor._version
