"""One process at a time in a directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from msfusion.errors import RunDirectoryError
from msfusion.files import refusing_write_errors

LOCK = ".lock"
"""The name of the file that is locked. It may stay when nobody holds it."""

_held: dict[Path, object] = {}
"""The directories that this process holds. The operating system keeps other processes out, not other threads."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the directory, which is made where it is missing. The lock ends with the process, however that ends.

    Nothing stays of a directory in which nothing was left. Raises RunDirectoryError where somebody else holds it, or
    it cannot be made.
    """
    made = [each for each in (path, *path.parents) if not each.exists()]
    key, mine = path.resolve(), object()
    if _held.setdefault(key, mine) is not mine:
        raise _in_use(path)
    try:
        with refusing_write_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            file = (path / LOCK).open("a")
        with file:
            _hold(file, path)
            try:
                yield
            finally:
                _remove_if_empty(path, made)
    finally:
        del _held[key]


def _hold(file: IO[str], path: Path) -> None:
    """Lock the open file. Raises RunDirectoryError."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs in one directory are the user's to avoid
        return
    try:
        # Not flock: workers inherit that one, and would hold the directory of a process that was killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), (path / LOCK).stat()):
            return
    except OSError as error:
        raise _in_use(path) from error
    raise _in_use(path)  # whoever held the directory has just removed it


def _remove_if_empty(path: Path, made: list[Path]) -> None:
    """Remove the lock's file where it is all that is there, and the directories that were made for it."""
    with suppress(OSError):
        if [each.name for each in path.iterdir()] == [LOCK]:
            (path / LOCK).unlink()
            for each in made:
                each.rmdir()


def _in_use(path: Path) -> RunDirectoryError:
    return RunDirectoryError(
        f"{path} is in use by another run: wait until that one has ended, or choose another --out."
    )
