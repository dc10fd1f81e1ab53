"""Watchers for tests: one that sees nothing, and one that pulls the plug."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from msfusion.experiment.train import Silent, Watcher


def silent(title: str) -> AbstractContextManager[Watcher]:
    """For comparisons."""
    return Silent()


class Stopping(Silent):
    """Fails once a round is done, as a power cut would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def round(self, line: Mapping[str, Any]) -> None:
        if line["round"] == self.after:
            raise KeyboardInterrupt
