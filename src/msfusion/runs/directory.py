"""A run's directory: what was asked, what came of each round, and enough to go on after being killed.

- `config.toml`: the resolved configuration
- `metrics.jsonl`: one line a round
- `checkpoints/`: the global state after a round, and what the participants keep; the newest two stay
- `tensorboard/`: the same metrics as events, where TensorBoard is installed
- `model.safetensors`: the final global state
- `summary.json`: the final figures; written last, so a run that has it is finished
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from msfusion.errors import RunDirectoryError
from msfusion.methods.memory import Memories, with_memories, without_memories
from msfusion.runs.files import (
    TEMPORARY,
    append_line,
    read_tensors,
    refusing_write_errors,
    remove_unfinished,
    write_json,
    write_tensors,
    write_text,
)

KEPT_CHECKPOINTS = 2
_LOCK = ".lock"


@dataclass(frozen=True)
class Checkpoint:
    """The global state after so many rounds, and what each participant keeps for itself."""

    rounds: int
    state: dict[str, Tensor]
    memories: Memories = field(default_factory=dict)


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run. Make one with `create` or `reopen`."""

    path: Path

    @staticmethod
    def check_free(path: Path) -> None:
        """Raises RunDirectoryError where `path` is a file or a directory with something in it."""
        with refusing_write_errors(path):
            if path.exists() and not path.is_dir():
                raise RunDirectoryError(f"{path} is a file, not a directory; choose another --out.")
            if path.is_dir() and any(_belongs_to_someone(entry) for entry in path.iterdir()):
                raise RunDirectoryError(
                    f"{path} already holds files; continue that run with --resume or choose another --out."
                )

    @classmethod
    def create(cls, path: Path, config_toml: str) -> RunDirectory:
        """Start a run in a directory that does not exist or is empty.

        Raises RunDirectoryError where there is something in it already, or where it cannot be written.
        """
        cls.check_free(path)
        directory = cls(path)
        with refusing_write_errors(path):
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        try:
            write_text(directory.config, config_toml)
        except RunDirectoryError:
            with suppress(OSError):  # leave nothing behind
                (path / "checkpoints").rmdir()
                path.rmdir()
            raise
        return directory

    @classmethod
    def reopen(cls, path: Path) -> RunDirectory:
        """Open the directory of a run that was started before. Raises RunDirectoryError where it is none."""
        directory = cls(path)
        if not directory.config.is_file():
            raise RunDirectoryError(f"{path} has no config.toml, so there is no run in it.")
        return directory

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """One JSON object a line, one line a round."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The final figures."""
        return self.path / "summary.json"

    @property
    def model(self) -> Path:
        """The final global state."""
        return self.path / "model.safetensors"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.summary.is_file() and self.model.is_file()

    def read_summary(self) -> dict[str, Any]:
        """What `finish` wrote. Raises RunDirectoryError where it is missing or damaged."""
        try:
            summary: dict[str, Any] = json.loads(self.summary.read_text())
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{self.summary} cannot be read: {error}.") from error
        return summary

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of all rounds so far, up to one that was cut short or is out of order."""
        if not self.metrics.is_file():
            return []
        lines: list[dict[str, Any]] = []
        for text in self.metrics.read_text(errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                break
            if not isinstance(line, dict) or line.get("round") != len(lines) + 1:
                break
            lines.append(line)
        return lines

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one round's line. Raises RunDirectoryError."""
        append_line(self.metrics, json.dumps(dict(line)))

    def keep_metrics(self, rounds: int) -> list[dict[str, Any]]:
        """Drop the lines after the given number of rounds and return the others. Raises RunDirectoryError.

        Rounds that came after the last whole checkpoint are run again, and their lines written again.
        """
        kept = self.read_metrics()[:rounds]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))
        return kept

    def save_checkpoint(
        self, rounds: int, state: Mapping[str, Tensor], fingerprint: str, memories: Memories | None = None
    ) -> None:
        """Keep the state after so many rounds, and drop checkpoints older than the newest two.

        The participants' memories are in the same file, so that both are of the same round.
        `fingerprint` identifies the configuration. Raises RunDirectoryError; older checkpoints stay intact.
        """
        path = self.path / "checkpoints" / f"round-{rounds:06d}.safetensors"
        tensors = with_memories(state, memories or {})
        write_tensors(path, tensors, {"rounds": rounds, "config": fingerprint})
        with refusing_write_errors(path.parent):
            for old in self._checkpoints()[KEPT_CHECKPOINTS:]:
                old.unlink(missing_ok=True)

    def load_checkpoint(self, fingerprint: str) -> Checkpoint | None:
        """The newest checkpoint that is whole, of this configuration, and with all its lines of metrics.

        None where there is none: the run begins again, and loses nothing but time.
        """
        with_metrics = len(self.read_metrics())
        for path in self._checkpoints():
            try:
                tensors, metadata = read_tensors(path)
            except RunDirectoryError:
                continue  # a damaged one: the one before it will do
            rounds = metadata.get("rounds")
            if metadata.get("config") == fingerprint and isinstance(rounds, int) and rounds <= with_metrics:
                return Checkpoint(rounds, *without_memories(tensors))
        return None

    def finish(self, state: Mapping[str, Tensor], summary: Mapping[str, Any]) -> None:
        """Write the final state and figures. Raises RunDirectoryError."""
        write_tensors(self.model, state, {"format": 1})
        write_json(self.summary, dict(summary))

    def _checkpoints(self) -> list[Path]:
        """The files of all checkpoints, newest first."""
        return sorted((self.path / "checkpoints").glob("round-*.safetensors"), reverse=True)

    def remove(self) -> None:
        """Delete the run with all that is in its directory."""
        with refusing_write_errors(self.path):
            shutil.rmtree(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here, and remove what a killed one left half-written.

        Raises RunDirectoryError where another process holds the directory. The operating system lifts the
        lock when the process ends, however it ends.
        """
        with self._lock():
            with refusing_write_errors(self.path):
                (self.path / "checkpoints").mkdir(exist_ok=True)
                remove_unfinished(self.path)
                remove_unfinished(self.path / "checkpoints")
            yield

    @contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            import fcntl
        except ImportError:  # Windows: two runs in one directory are the user's to avoid
            yield
            return
        with refusing_write_errors(self.path):
            file = (self.path / _LOCK).open("a")
        with file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunDirectoryError(f"{self.path} is in use by another process.") from error
            yield


def fresh_path(name: str, parent: Path = Path("runs")) -> Path:
    """Make and return the directory `<parent>/<name>-<n>` with the next free number n, from 1.

    Raises RunDirectoryError where it cannot be made.
    """
    with refusing_write_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        number = 1 + max((_number(path, name) for path in parent.iterdir()), default=0)
        while True:
            path = parent / f"{name}-{number}"
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
            else:
                return path


@contextmanager
def reserved_path(path: Path | None, name: str) -> Iterator[Path]:
    """The path, or for None a fresh one of that name, which is removed again if nothing came of it."""
    if path is not None:
        yield path
        return
    path = fresh_path(name)
    try:
        yield path
    except BaseException:
        with suppress(OSError):  # not empty: there is something to keep
            path.rmdir()
        raise


def newest_path(name: str, parent: Path = Path("runs")) -> Path:
    """The directory `<parent>/<name>-<n>` with the highest n. Raises RunDirectoryError if there is none."""
    there = parent.iterdir() if parent.is_dir() else ()
    number, path = max(((_number(path, name), path) for path in there), default=(0, parent))
    if number == 0:
        raise RunDirectoryError(f"There is no run {parent / name}-<n> to resume; name one with --out.")
    return path


def _belongs_to_someone(entry: Path) -> bool:
    """Whether a directory that holds this is in use; what a run killed in its first moments left is not."""
    if entry.name == "checkpoints" and entry.is_dir():
        return any(entry.iterdir())
    return entry.name != _LOCK and not entry.name.startswith(TEMPORARY)


def _number(path: Path, name: str) -> int:
    """The number at the end of `<name>-<n>`; 0 where the directory is called otherwise."""
    prefix, _, suffix = path.name.rpartition("-")
    return int(suffix) if prefix == name and path.is_dir() and suffix.isascii() and suffix.isdigit() else 0
