"""Files that a person named, read without trusting how long they are."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def read_at_most(path: Path, most: int) -> bytes | None:
    """What is in a file; None where that is more than `most` bytes.

    Raises OSError, for a device too: to read from one, or to wait for it, may have no end.
    """
    status = path.stat().st_mode
    if stat.S_ISCHR(status) or stat.S_ISBLK(status):
        raise OSError(errno.EINVAL, "Is a device", os.fspath(path))
    with path.open("rb") as file:
        content = file.read(most + 1)
    return content if len(content) <= most else None
