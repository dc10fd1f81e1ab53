"""The files of certificates, keys and tokens as they are read: not without end, and secrets only if they are secret."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from msfusion.errors import ConfigError
from msfusion.reading import read_at_most

REMEDY = "make new ones with 'msfusion certificates'"

_MOST_BYTES = 2**20


def read_key_file(path: Path, most: int = _MOST_BYTES) -> bytes:
    """What is in a file. Raises ConfigError where it cannot be read, or is longer than any such file."""
    try:
        content = read_at_most(path, most)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): {REMEDY}") from error
    if content is None:
        raise ConfigError(
            f"{path} is longer than any file of certificates, keys or tokens: more than {most} bytes"
        )
    return content


def read_secret(path: Path, most: int = _MOST_BYTES) -> bytes:
    """The same of a file that only its owner may see. Raises ConfigError where others can read it, as ssh does."""
    content = read_key_file(path, most)
    status = path.stat()
    others = stat.S_IMODE(status.st_mode) & 0o077
    if os.name == "posix" and status.st_uid == os.getuid() and others:
        raise ConfigError(
            f"{path} is a secret that others on this machine can read (its mode is "
            f"{stat.S_IMODE(status.st_mode):04o}): run 'chmod 600 {path}'; if anybody may have read it, make new "
            "certificates"
        )
    return content
