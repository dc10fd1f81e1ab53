"""A run's directory: what was asked, what came of each round, and enough to go on after being killed.

- `config.toml`: the resolved configuration
- `fingerprint.json`: digests of the configuration, the data and the user's code with which the run began
- `metrics.jsonl`: one line a round
- `checkpoints/`: the global state after a round, and what the participants keep, where that is much in files beside it
  (`memory_files`); the newest two stay
- `tensorboard/`: the same metrics as events, where TensorBoard is installed
- `model.safetensors`: the final global state
- `summary.json`: the final figures; written last, so a run that has it is finished
- `about.json`, `report.html`: for readers (`experiment.page`); nothing depends on them, and a run without is as good

No file is believed for its name. Each JSON file and each file of tensors has a digest of itself, a checkpoint those of
the fingerprint and of the metrics that it goes with, the summary those of all that a finished run consists of.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from msfusion.errors import RunDirectoryError
from msfusion.experiment.fingerprint import Fingerprint
from msfusion.experiment.lock import LOCK, locked
from msfusion.experiment.memory_files import REFERENCES, MemoryFiles, check_with_memories
from msfusion.federated.memory import MARK, Memories, with_memories, without_memories
from msfusion.files import (
    TEMPORARY,
    Streamed,
    append_line,
    check_tensors,
    read_sealed_json,
    refusing_write_errors,
    remove_unfinished,
    when_files_can_be_opened,
    write_bytes,
    write_sealed_json,
    write_streamed,
    write_tensors,
    write_text,
    written_digest,
)

KEPT_CHECKPOINTS = 2

_ORDER = "order"
"""In a checkpoint's metadata, the names of the state's tensors in their order."""

Made = TypeVar("Made")


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
    def check_free(
        path: Path, remedy: str = "continue that run with --resume or choose another --out"
    ) -> None:
        """Raises RunDirectoryError, with what to do, where `path` is a file or a directory with something in it."""
        with refusing_write_errors(path):
            if path.exists() and not path.is_dir():
                raise RunDirectoryError(f"{path} is a file, not a directory; choose another --out.")
            if path.is_dir() and any(_belongs_to_someone(entry) for entry in path.iterdir()):
                raise RunDirectoryError(f"{path} already holds files; {remedy}.")

    @classmethod
    def create(cls, path: Path, config_toml: str, fingerprint: Fingerprint) -> RunDirectory:
        """Start a run in a directory that does not exist or is empty.

        Raises RunDirectoryError where there is something in it already, or where it cannot be written.
        """
        cls.check_free(path)
        directory = cls(path)
        began = {**asdict(fingerprint), "config.toml": _digest(config_toml.encode())}
        if directory.fingerprint.exists() and read_sealed_json(directory.fingerprint) != began:
            raise RunDirectoryError(
                f"{path} holds the {directory.fingerprint.name} of another run, whose config.toml is gone; "
                "choose another --out."
            )
        with refusing_write_errors(path):
            (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        try:
            write_sealed_json(directory.fingerprint, began)
            write_text(directory.config, config_toml)  # last: where this is, there is a run
        except RunDirectoryError:
            with suppress(OSError):  # leave nothing behind
                directory.fingerprint.unlink(missing_ok=True)
                (path / "checkpoints").rmdir()
                path.rmdir()
            raise
        return directory

    @classmethod
    def reopen(cls, path: Path) -> RunDirectory:
        """Open the directory of a run that was started before.

        Raises RunDirectoryError where it is none, or its configuration is not the one with which it began.
        """
        directory = cls(path)
        if not directory.config.is_file():
            raise RunDirectoryError(
                f"there is no run in {path} to resume: it has no config.toml; name the directory of a run with --out, "
                "or give its CONFIG to begin."
            )
        if not directory.fingerprint.is_file():
            raise RunDirectoryError(
                f"{path} has no {directory.fingerprint.name}: it was removed, or an older msfusion began the run, "
                "whose files cannot be checked; choose another --out."
            )
        try:
            text = directory.config.read_bytes()
        except OSError as error:
            raise RunDirectoryError(f"{directory.config} cannot be read: {error.strerror}.") from error
        if read_sealed_json(directory.fingerprint).get("config.toml") != _digest(text):
            raise RunDirectoryError(
                f"{directory.config} was changed after the run began, or is of another run: put back what it was, "
                "or choose another --out."
            )
        return directory

    def read_fingerprint(self) -> Fingerprint:
        """With what the run began. Raises RunDirectoryError."""
        began = read_sealed_json(self.fingerprint)
        try:
            return Fingerprint(began["config"], began["data"], began["code"], began["model"])
        except KeyError as error:
            raise RunDirectoryError(f"{self.fingerprint} is not of this version of msfusion.") from error

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def fingerprint(self) -> Path:
        """Digests of what the run began with."""
        return self.path / "fingerprint.json"

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

    @cached_property
    def _memory_files(self) -> MemoryFiles:
        """What participants keep, beside the checkpoints."""
        return MemoryFiles(self.path / "checkpoints")

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return self.summary.is_file() and self.model.is_file()

    def read_summary(self) -> dict[str, Any]:
        """The figures that `finish` wrote. Raises RunDirectoryError where they are missing or damaged."""
        summary = read_sealed_json(self.summary)
        summary.pop("files", None)
        return summary

    def check_end(self) -> None:
        """Raises RunDirectoryError where a file of a finished run is damaged, or of another run.

        A checkpoint may be missing: a finished run needs it no more, but for what participants keep for themselves.
        """
        try:
            files = read_sealed_json(self.summary).get("files")
            if files != self._digests_of_end():
                raise RunDirectoryError(f"the files in {self.path} are not those with which the run ended.")
            check_tensors(self.model)
            for path in self._checkpoints()[:1]:
                if _told_by(path, check_with_memories(path)[1]).run != files[self.fingerprint.name]:
                    raise RunDirectoryError(f"{path} is a checkpoint of another run.")
        except RunDirectoryError as error:
            raise RunDirectoryError(
                f"the finished run in {self.path} is damaged ({str(error).rstrip('.')}); delete its summary.json and "
                "go on with --resume, which makes the end again from the last checkpoint that is whole."
            ) from error

    @when_files_can_be_opened
    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of all rounds so far, up to one that was cut short or is out of order."""
        lines: list[dict[str, Any]] = []
        for text in self._metrics_lines():
            try:
                line = json.loads(text.decode())
            except (ValueError, RecursionError):
                break
            if not isinstance(line, dict) or line.get("round") != len(lines) + 1:
                break
            lines.append(line)
        return lines

    @when_files_can_be_opened
    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Add one round's line. Raises RunDirectoryError."""
        append_line(self.metrics, json.dumps(dict(line)))

    def keep_metrics(self, rounds: int) -> list[dict[str, Any]]:
        """Drop the lines after the given number of rounds and return the others. Raises RunDirectoryError.

        Rounds that came after the last whole checkpoint are run again, and their lines written again.
        """
        write_bytes(self.metrics, b"".join(self._metrics_lines()[:rounds]))
        return self.read_metrics()

    def _metrics_lines(self) -> list[bytes]:
        """Each with what ends it."""
        if not self.metrics.is_file():
            return []
        with io.BytesIO(self.metrics.read_bytes()) as file:
            return file.readlines()

    @when_files_can_be_opened
    def save_checkpoint(
        self,
        rounds: int,
        state: Mapping[str, Tensor] | Streamed,
        fingerprint: str,
        memories: Memories | None = None,
    ) -> None:
        """Keep the state after so many rounds, and drop checkpoints older than the newest two, and any of later rounds.

        A run that went back, or began again, leaves later ones, whose lines of metrics are gone: nothing can go on from
        them, and in the place of these they would be kept.
        The file has the participants' memories in it, or names those beside it that have them, so that both are of the
        same round. A streamed state has them in it. `fingerprint` is the digest of that of the run. The lines of
        metrics of so many rounds have been written. Raises RunDirectoryError; older checkpoints stay intact.
        """
        path = self.path / "checkpoints" / f"round-{rounds:06d}.safetensors"
        metrics = _digest(*self._metrics_lines()[:rounds])
        metadata = {"rounds": rounds, "run": fingerprint, "metrics": metrics}
        if isinstance(state, Streamed):
            order = [name for name in state.forms if not name.startswith(MARK)]
            write_streamed(path, state, {**metadata, _ORDER: order})
        else:
            few, elsewhere = self._memory_files.save(rounds, with_memories({}, memories or {}))
            named = {REFERENCES: elsewhere} if elsewhere else {}
            write_tensors(path, {**state, **few}, {**metadata, **named, _ORDER: list(state)})
        self._drop_others(rounds)

    def _drop_others(self, rounds: int) -> None:
        """Keep the newest two checkpoints of a run that has come to so many rounds, with what they need."""
        with refusing_write_errors(self.path / "checkpoints"):
            later = [each for each in self._checkpoints() if _rounds_of(each) > rounds]
            for useless in (*later, *self._checkpoints()[len(later) + KEPT_CHECKPOINTS :]):
                useless.unlink(missing_ok=True)
            self._memory_files.remove_others(self._checkpoints())

    def load_checkpoint(
        self, fingerprint: str, tell: Callable[[str], None] = lambda _: None, at_most: int | None = None
    ) -> Checkpoint | None:
        """As `newest_checkpoint`, in memory."""
        found = self.newest_checkpoint(self._read_in_order, fingerprint, tell, at_most)
        return None if found is None else Checkpoint(found[0], *without_memories(found[1]))

    def newest_checkpoint(
        self,
        read: Callable[[Path], tuple[Made, dict[str, Any]]],
        fingerprint: str,
        tell: Callable[[str], None] = lambda _: None,
        at_most: int | None = None,
    ) -> tuple[int, Made] | None:
        """The newest checkpoint that is whole, of this run, and with all its lines of metrics as they were.

        `at_most`: after how many rounds it may have been made.

        It is given as how many rounds are done, and what `read` makes of its file beside the metadata. None where there
        is none: the run begins again, and loses nothing but time. Raises RunDirectoryError where it would begin again
        over whole checkpoints of another run. `tell` is given a sentence for each file whose damage
        costs finished rounds.
        """
        lines = self._metrics_lines()
        foreign, flaws = None, []
        found: tuple[int, Made] | None = None
        for path in self._checkpoints():
            if at_most is not None and _rounds_of(path) > at_most:
                continue
            try:
                made, metadata = read(path)
                told = _told_by(path, metadata)
            except RunDirectoryError:
                flaws.append(f"{path} is damaged")  # the one before it will do
                continue
            if told.run != fingerprint:
                foreign = path
            elif told.metrics == _digest(*lines[: told.rounds]):
                found = told.rounds, made
                break
            else:
                flaws.append(self._metrics_flaw(told.rounds))
        if found is None and foreign is not None:
            raise RunDirectoryError(f"{foreign} is a checkpoint of another run; remove it to go on without.")
        where = "beginning again" if found is None else f"going on after round {found[0]}"
        for flaw in dict.fromkeys(flaws):
            tell(f"{flaw}: {where}")
        return found

    def furthest_back(self, every: int) -> int:
        """How many rounds a run may have to go back that leaves a checkpoint every so many: to the one before last.

        Those that are there may lie further apart: how often checkpoints are made may change whenever a run goes on.
        """
        there = [_rounds_of(path) for path in self._checkpoints()]
        apart = max(there, default=0) - min(there, default=0)
        return every + max(every, apart)

    def _metrics_flaw(self, rounds: int) -> str:
        """What is wrong with the metrics of so many rounds, which are not as they were."""
        whole = len(self.read_metrics())
        if whole >= rounds:
            return f"{self.metrics} was changed after it was written"
        if len(self._metrics_lines()) <= whole:
            return f"{self.metrics} ends after line {whole}"
        return f"{self.metrics} is damaged in line {whole + 1}"

    @when_files_can_be_opened
    def save_model(self, state: Mapping[str, Tensor] | Streamed) -> None:
        """Write the final state. Raises RunDirectoryError."""
        _write(self.model, state, {"format": 1})

    @when_files_can_be_opened
    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the final figures, and digests of the files that belong to the end. Raises RunDirectoryError.

        The model has been saved. What a process left that was killed just after its last checkpoint goes now.
        """
        write_sealed_json(self.summary, {**summary, "files": self._digests_of_end()})
        self._drop_others(len(self._metrics_lines()))

    def _digests_of_end(self) -> dict[str, str]:
        """Of the files that a finished run consists of. Raises RunDirectoryError."""
        return {
            self.fingerprint.name: self.read_fingerprint().digest,
            self.metrics.name: _digest(*self._metrics_lines()),
            self.model.name: written_digest(self.model),
        }

    def _checkpoints(self) -> list[Path]:
        """The files of all checkpoints, newest first."""
        return sorted((self.path / "checkpoints").glob("round-*.safetensors"), reverse=True)

    def _read_in_order(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of a checkpoint, those of the state in its order; a file has them by their names.

        Messages are made in that order, and a participant knows by their bytes that it has done a task already.
        Checkpoints of older versions do not have it.
        """
        tensors, metadata = self._memory_files.read(path)
        of_state = [name for name in tensors if not name.startswith(MARK)]
        order = metadata.get(_ORDER, of_state)
        named = isinstance(order, list) and all(isinstance(each, str) for each in order)
        if not named or sorted(order) != sorted(of_state):
            raise RunDirectoryError(f"{path} is damaged: its tensors are not those that it names.")
        return {**{name: tensors[name] for name in order}, **tensors}, metadata

    def remove(self) -> None:
        """Delete the run with all that is in its directory."""
        with refusing_write_errors(self.path):
            shutil.rmtree(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs from writing here, and remove what a killed one left half-written.

        Raises RunDirectoryError where another run holds the directory.
        """
        with locked(self.path):
            with refusing_write_errors(self.path):
                remove_unfinished(self.path)
                remove_unfinished(self.path / "checkpoints")
            yield


def _write(path: Path, state: Mapping[str, Tensor] | Streamed, metadata: Mapping[str, Any]) -> None:
    """A file of tensors, which are at hand or come one after the other. Raises RunDirectoryError."""
    if isinstance(state, Streamed):
        write_streamed(path, state, metadata)
    else:
        write_tensors(path, state, metadata)


@dataclass(frozen=True)
class _Told:
    """What a checkpoint says of itself: after how many rounds, of which run, with which lines of metrics."""

    rounds: int
    run: str
    metrics: str


def _told_by(path: Path, metadata: Mapping[str, Any]) -> _Told:
    """Raises RunDirectoryError where the metadata of a checkpoint is not what `save_checkpoint` writes."""
    told = [metadata.get(key) for key in ("rounds", "run", "metrics")]
    if told[0] != _rounds_of(path) or not all(isinstance(each, str) for each in told[1:]):
        raise RunDirectoryError(f"{path} is damaged: it does not say which rounds it is of.")
    return _Told(_rounds_of(path), str(told[1]), str(told[2]))


def _rounds_of(checkpoint: Path) -> int:
    """After how many rounds a checkpoint was made, by the name of its file."""
    return int(checkpoint.stem.removeprefix("round-"))


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
    return entry.name not in (LOCK, "fingerprint.json") and not entry.name.startswith(TEMPORARY)


def _number(path: Path, name: str) -> int:
    """The number at the end of `<name>-<n>`; 0 where the directory is called otherwise."""
    prefix, _, suffix = path.name.rpartition("-")
    return int(suffix) if prefix == name and path.is_dir() and suffix.isascii() and suffix.isdigit() else 0


def _digest(*texts: bytes) -> str:
    """Of texts one after the other."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text)
    return digest.hexdigest()
