"""What every test gets: one thread per process; with MSFUSION_CHECK_TYPES=1, every call checked by jaxtyping and beartype."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if os.environ.get("MSFUSION_CHECK_TYPES") == "1":  # nearly doubles the processor's time: scripts/check --types
    from jaxtyping import install_import_hook

    install_import_hook("msfusion", "beartype.beartype")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares a cached trace or a module's fixture runs in one process, which then makes it once."""
    for item in items:
        entry = getattr(item, "callspec", None) and item.callspec.params.get("entry")
        item.add_marker(pytest.mark.xdist_group(str(entry) if entry else item.path.stem))


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    """Models built in a test have the same initial weights in any order of the tests."""
    torch.manual_seed(0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, and tables as wide as in a file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path
