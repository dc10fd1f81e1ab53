"""How much memory this machine has, so that what cannot fit is refused in words before it is tried."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory() -> int:
    """Bytes of memory that this machine, or the container that this process runs in, has in all.

    Where the system does not say, the largest number: nothing is refused then.
    """
    known = [sys.maxsize]
    with contextlib.suppress(AttributeError, OSError, ValueError):  # Windows has no sysconf
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            known.append(int(Path(path).read_text()))
    return min(each for each in known if each > 0)
