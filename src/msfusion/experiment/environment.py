"""Where a result was measured: versions, machine and commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions of what the results depend on, the machine, and the commit of the sources, if any."""
    packages = ("msfusion", "torch", "numpy", "transformers", "datasets", "numba", "zstandard")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **{name: found for name in packages if (found := _version(name)) is not None},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with `+changes` where files differ from it."""
    here = Path(__file__).resolve().parent
    if not any((parent / ".git").exists() for parent in here.parents[:4]):
        return None  # installed, perhaps inside somebody else's repository
    try:
        commit = _git(here, "rev-parse", "HEAD")
        changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


def _git(directory: Path, *arguments: str) -> str:
    finished = subprocess.run(
        ["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=10, check=True
    )
    return finished.stdout.strip()
