"""What `data.source` names: a folder or file that is here, or a data set of the Hub; never another of the same name."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msfusion.data.spec import DataSpec
from msfusion.errors import DataError
from msfusion.files import digest_of_json

READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
"""How `datasets` calls the reader of a single file, by the end of the file's name. Of a text each line is a row."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
"""What `datasets` calls the version of a data set of the Hub. Digests of local files are shorter, of readers longer."""


def local_source(source: str) -> Path | None:
    """The folder or file that a source names; None for a name of the Hub.

    A name of the Hub is `name` or `user/name`. What begins as a path, ends as the name of a file, or lies in a folder
    that is here, is not looked for there. Raises DataError where such a folder or file is missing.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path.resolve()  # by a name alone, such as text, `datasets` would take a reader of its own
    written_as_path = source.startswith((".", "/", "~")) or source.endswith("/") or source.count("/") > 1
    if written_as_path or path.suffix.lower() in READERS or ("/" in source and path.parent.is_dir()):
        kind = "file" if path.suffix.lower() in READERS else "folder"
        raise DataError(f"data.source = '{source}': there is no such {kind} (seen from {Path.cwd()}).")
    return None


def reader_of(source: Path, spec: DataSpec, cache: str) -> tuple[str, dict[str, Any]]:
    """The name and arguments by which `datasets` loads a folder or file that is here. Raises DataError for programs.

    `cache` is where it keeps what it has read. It would take what it kept for any files of the same names and times
    of change; so each content gets a folder of its own there.
    """
    script = source / f"{source.name}.py" if source.is_dir() else source
    if script.suffix == ".py" and script.is_file():
        raise DataError(
            f"data.source = '{spec.source}': {script.name} is a program, which is never run: keep the data itself "
            f"there (parquet, csv, json), or name a function of your own as module:function."
        )
    kept = {"cache_dir": f"{cache}/msfusion/{_state_of(source)}"}
    if source.is_dir():
        return str(source), kept
    if source.suffix.lower() not in READERS:
        raise DataError(
            f"data.source = '{spec.source}' is a file of a kind that is not read: give a folder in the Hub's layout, "
            f"or a file ending with {', '.join(READERS)}."
        )
    reader, settings = READERS[source.suffix.lower()]
    return reader, {"data_files": str(source), **settings, **kept}


def _state_of(source: Path) -> str:
    """A digest of which files there are and when each was written: of that the system notes what nobody sets back."""
    files = [source] if source.is_file() else sorted(_files_in(source))
    states = [(str(file), file.stat()) for file in files]
    return digest_of_json(
        [[name, at.st_size, at.st_ino, at.st_mtime_ns, at.st_ctime_ns] for name, at in states]
    )


def _files_in(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if Path(place, name).is_file())


def refuse_other_than_hub(builder: Any, spec: DataSpec) -> None:
    """Raises DataError where `datasets` would give for a name of the Hub what was made from files.

    Where the Hub has no such data set, or cannot be reached, it takes what it once kept under that name: also of a
    folder that was called so and lay elsewhere. A name such as csv is to it a reader for the folder one is in.
    """
    if _COMMIT.fullmatch(str(builder.hash)) is None:
        raise DataError(
            f"data.source = '{spec.source}': there is no such folder (seen from {Path.cwd()}), and not from the Hub: "
            "what `datasets` has under that name was made from other files; give the path of the folder."
        )
