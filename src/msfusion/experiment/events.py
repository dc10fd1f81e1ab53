"""The metrics of a run as TensorBoard events, where `pip install 'msfusion[tensorboard]'` was done."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from msfusion.files import refusing_write_errors

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
        self._writer: Any = None
        self._path = directory / "tensorboard"
        try:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            return
        with refusing_write_errors(self._path):
            shutil.rmtree(self._path, ignore_errors=True)
            self._writer = EventFileWriter(str(self._path))
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
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        shown = {**{key: line.get(key) for key in _SHOWN}, **line.get("metrics", {})}
        values = [
            Summary.Value(tag=key, simple_value=value) for key, value in shown.items() if value is not None
        ]
        with refusing_write_errors(self._path):
            self._writer.add_event(Event(step=line["round"], summary=Summary(value=values)))

    def __enter__(self) -> Events:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            with refusing_write_errors(self._path):
                self._writer.close()
