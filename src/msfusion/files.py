"""Files that appear whole or not at all: written beside their place, synced, then renamed into it."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from msfusion.digests import add_tensor, digest_of_tensors, hashing, pieces_of
from msfusion.errors import RunDirectoryError
from msfusion.memory import machine_memory

TEMPORARY = ".tmp"
"""What the name of every unfinished file starts with (safetensors' own unfinished files too)."""

_METADATA = "msfusion"
_DIGEST = "sha256"


OPENING_SECONDS = 60.0
"""For how long files cannot be opened before a run is ended by it."""

P = ParamSpec("P")
R = TypeVar("R")


def allow_many_files() -> None:
    """Let this process have as many files and connections open as the system lets it: at first it is far fewer."""
    with suppress(
        ImportError, OSError, ValueError
    ):  # Windows has no such limit, and some systems refuse their own
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def when_files_can_be_opened(function: Callable[P, R]) -> Callable[P, R]:
    """Call a function again while too many files are open for it, for at most OPENING_SECONDS.

    Strangers may take what a server can open for as long as their connections are let be. The function must leave
    nothing half done where it fails.
    """

    @functools.wraps(function)
    def called(*arguments: P.args, **options: P.kwargs) -> R:
        end = time.monotonic() + OPENING_SECONDS
        while True:
            try:
                return function(*arguments, **options)
            except (OSError, RunDirectoryError) as error:
                if not too_many_are_open(error) or time.monotonic() > end:
                    raise
            time.sleep(0.2)

    return called


def too_many_are_open(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that this process or system has too many files open."""
    numbers = (errno.EMFILE, errno.ENFILE)
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return True
        # safetensors opens a file itself, and has PyTorch open it again: each says so in a text of its own
        if isinstance(error, SafetensorError | RuntimeError) and any(
            f"{os.strerror(each)} (" in str(error) for each in numbers
        ):
            return True
        error = error.__cause__
    return False


@contextmanager
def refusing_write_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, missing rights and the like into one sentence. Raises RunDirectoryError."""
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be written: {error.strerror or error}.") from error
    except SafetensorError as error:  # the Rust library reports a full disk in its own type
        reason = str(error).split("I/O error: ")[-1].split(" (os error")[0]
        raise RunDirectoryError(f"{path} cannot be written: {reason}.") from error


def write_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file under another name in the same directory, then put it in its place.

    After a crash or a power cut, `path` is the old file or the new one. Raises RunDirectoryError where it
    cannot be written; nothing is left behind then.
    """
    temporary = path.with_name(f"{TEMPORARY}-{os.getpid()}-{path.name}")
    with refusing_write_errors(path):
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


def write_folder_with(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder under another name, then put it in the place of `path`, which is free or empty.

    Raises RunDirectoryError where it cannot be written; nothing is left behind then.
    """
    temporary = path.with_name(f"{TEMPORARY}-{os.getpid()}-{path.name}")
    with refusing_write_errors(path):
        temporary.mkdir(parents=True)
        try:
            write(temporary)
            temporary.replace(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all. Raises RunDirectoryError."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all. Raises RunDirectoryError."""
    write_with(path, lambda temporary: _write_bytes(temporary, content))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all. Raises RunDirectoryError."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as `write_json` does, with a digest of itself under "sha256". Raises RunDirectoryError."""
    write_json(path, {**value, _DIGEST: digest_of_json(value)})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """What `write_sealed_json` wrote. Raises RunDirectoryError where it is missing or anything in it has changed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunDirectoryError(f"{path} is damaged or missing: {error}.") from error
    if not isinstance(value, dict) or value.pop(_DIGEST, None) != digest_of_json(value):
        raise RunDirectoryError(f"{path} is damaged: it is not what was written there.")
    return value


def digest_of_json(value: Any) -> str:
    """A SHA-256 digest of what JSON can hold. Keys may be in any order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, private: bool = False
) -> None:
    """Write tensors as safetensors, whole or not at all, with a digest of tensors and metadata.

    Equal tensors and metadata give equal bytes. What is `private` only the owner may read. Raises RunDirectoryError.
    """
    from safetensors.torch import save_file

    separate = _without_sharing(tensors)
    sealed = {**metadata, _DIGEST: _digest(separate, metadata)}
    # One key only: safetensors writes several in an order that changes from process to process.
    header = {_METADATA: json.dumps(sealed, sort_keys=True)}

    def write(temporary: Path) -> None:
        temporary.touch(0o600 if private else 0o666)
        rights = temporary.stat().st_mode
        save_file(separate, temporary, metadata=header)
        temporary.chmod(rights)  # safetensors leaves files that only their owner may read

    write_with(path, write)


@dataclass(frozen=True)
class Streamed:
    """Tensors that are read one at a time, in the order of their names, as each is written: all need not fit in memory.

    `forms` has the type and the shape of each.
    """

    forms: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    read: Callable[[str], Tensor]


def write_streamed(path: Path, tensors: Streamed, metadata: Mapping[str, Any]) -> None:
    """The same file as `write_tensors`, byte for byte, of tensors that are read one at a time.

    Raises RunDirectoryError, and what reading raises.
    """
    entries: dict[str, Any] = {}
    cursor = 0
    for name, code in _safetensors_order(tensors.forms):
        shape = tensors.forms[name][1]
        size = math.prod(shape) * tensors.forms[name][0].itemsize
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [cursor, cursor + size]}
        cursor += size

    def header(digest: str) -> bytes:
        sealed = json.dumps({**metadata, _DIGEST: digest}, sort_keys=True)
        outline = {"__metadata__": {_METADATA: sealed}, **entries}
        text = json.dumps(outline, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def write(temporary: Path) -> None:
        digest = hashing(json.dumps(dict(metadata), sort_keys=True))
        with temporary.open("wb") as file:
            begin = file.write(header("0" * 64))
            for name in sorted(entries):
                tensor = tensors.read(name).detach().contiguous()
                add_tensor(digest, name, tensor)
                file.seek(begin + entries[name]["data_offsets"][0])
                for piece in pieces_of(tensor):
                    file.write(piece)
            file.truncate(begin + cursor)
            file.seek(0)
            file.write(header(digest.hexdigest()))

    write_with(path, write)


def _safetensors_order(forms: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[tuple[str, str]]:
    """The names in the order in which safetensors writes them, with what it calls their types: it is asked itself."""
    from safetensors.torch import save

    outline = save({name: torch.empty(0, dtype=dtype) for name, (dtype, _) in forms.items()})
    found = json.loads(outline[8 : 8 + int.from_bytes(outline[:8], "little")])
    return [(name, entry["dtype"]) for name, entry in found.items() if name != "__metadata__"]


def check_tensors(path: Path) -> tuple[Streamed, dict[str, Any]]:
    """The same as `read_tensors`, with one tensor in memory at a time: what can be read again, and the metadata.

    Raises RunDirectoryError where the file is missing, or a bit of it has changed.
    """
    _, metadata, wanted = _read(path, names=())
    digest, forms = hashing(json.dumps(dict(metadata), sort_keys=True)), {}
    for name in sorted(names_in(path)):
        tensor = read_tensor(path, name)
        add_tensor(digest, name, tensor)
        forms[name] = tensor.dtype, tuple(tensor.shape)
    if digest.hexdigest() != wanted:
        raise RunDirectoryError(f"{path} is damaged: its tensors are not those that were written there.")
    return Streamed(forms, lambda name: read_tensor(path, name)), metadata


def names_in(path: Path) -> list[str]:
    """The names of a file's tensors. Raises RunDirectoryError."""
    with _told_if_damaged(path), _opened(path) as file:
        return [*file.keys()]


def shape_in(path: Path, name: str) -> tuple[int, ...]:
    """The shape of one tensor of a file, which is not read. Raises RunDirectoryError."""
    with _told_if_damaged(path), _opened(path) as file:
        return tuple(file.get_slice(name).get_shape())


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file. Raises RunDirectoryError."""
    return _read(path, names=(name,))[0][name]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file that `write_tensors` wrote.

    Raises RunDirectoryError where the file is missing, or a bit of it has changed.
    """
    tensors, metadata, digest = _read(path)
    if digest != _digest(tensors, metadata):
        raise RunDirectoryError(f"{path} is damaged: its tensors are not those that were written there.")
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata that `write_tensors` left in a file, whose tensors are not read. Raises RunDirectoryError."""
    return _read(path, names=())[1]


def written_digest(path: Path) -> str:
    """The digest that `write_tensors` left in a file, whose tensors are not read. Raises RunDirectoryError."""
    return _read(path, names=())[2]


def _read(path: Path, names: tuple[str, ...] | None = None) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Some of the tensors (by default all), the metadata and the digest of a file, unchecked."""
    with _told_if_damaged(path), _opened(path) as file:
        metadata = json.loads((file.metadata() or {})[_METADATA])
        digest = metadata.pop(_DIGEST)
        if names is None and path.stat().st_size > machine_memory():
            raise RunDirectoryError(f"{path} has more than this machine's memory can hold.")
        wanted = file.keys() if names is None else names
        return {name: file.get_tensor(name).clone() for name in wanted}, metadata, digest


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of tensors, opened. Raises OSError, RuntimeError or SafetensorError."""
    from safetensors import safe_open

    path.open("rb").close()  # why it cannot be opened: safetensors says of any such file that there is none
    with safe_open(path, framework="pt") as file:
        yield file


@contextmanager
def _told_if_damaged(path: Path) -> Iterator[None]:
    """Turn whatever reading a damaged file raises into a RunDirectoryError."""
    try:
        yield
    except (
        SafetensorError,
        OSError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        RuntimeError,
    ) as error:
        reason = " ".join(str(error).split())
        if not path.exists():
            raise RunDirectoryError(f"there is no {path}.") from error
        raise RunDirectoryError(
            f"{path} is damaged, or not a file of this version of msfusion: {reason}."
        ) from error


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    return digest_of_tensors(tensors, json.dumps(dict(metadata), sort_keys=True))


def append_line(path: Path, line: str) -> None:
    """Add one line to a text file and bring it to the disk. What a failed write left is taken back.

    Raises RunDirectoryError.
    """
    with refusing_write_errors(path), path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            rest = memoryview(line.encode() + b"\n")
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(before)
            raise


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed process was writing."""
    for path in directory.glob(f"{TEMPORARY}*"):
        path.unlink(missing_ok=True)


def _write_bytes(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)


def _without_sharing(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each contiguous and in memory of its own (safetensors refuses tied ones)."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        address = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return separate


def _sync_directory(directory: Path) -> None:
    """Bring a rename to the disk. Where directories cannot be opened (Windows), there is nothing to do."""
    with suppress(PermissionError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
