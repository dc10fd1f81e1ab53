"""The metrics of a run as TensorBoard events (`msfusion.tensorboard`), in its directory."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from msfusion.errors import ConfigError
from msfusion.files import refusing_write_errors
from msfusion.tensorboard import EventWriter, require_tensorboard

_SHOWN = (
    "training_loss",
    "loss",
    "accuracy",
    "perplexity",
    "entry_coverage",
    "overlap",
    "bytes_down",
    "bytes_up",
    "seconds",
    "simulated_seconds",
)


class Events:
    """Writes one scalar per metric and round, and nothing where TensorBoard is missing (`available`).

    The lines of earlier rounds are written anew when a run is resumed: events always mirror metrics.jsonl.
    """

    def __init__(self, directory: Path, earlier: Iterable[Mapping[str, Any]]) -> None:
        self._writer: EventWriter | None = None
        self._path = directory / "tensorboard"
        try:
            require_tensorboard()
        except ConfigError:
            return
        with refusing_write_errors(self._path):
            shutil.rmtree(self._path, ignore_errors=True)
            self._writer = EventWriter(self._path)
        for line in earlier:
            self.add(line)

    @property
    def available(self) -> bool:
        """Whether TensorBoard is installed."""
        return self._writer is not None

    def add(self, line: Mapping[str, Any]) -> None:
        """Write the metrics of one round. Raises RunDirectoryError."""
        if self._writer is None:
            return
        shown = {**{key: line.get(key) for key in _SHOWN}, **line.get("metrics", {})}
        known = {key: value for key, value in shown.items() if value is not None}
        with refusing_write_errors(self._path):
            self._writer.add(line["round"], known)

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            with refusing_write_errors(self._path):
                self._writer.close()
