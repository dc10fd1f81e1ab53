"""Figures as TensorBoard events, where `pip install 'msfusion[tensorboard]'` was done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from msfusion.extras import needing


def require_tensorboard() -> None:
    """Raise ConfigError where TensorBoard is not installed."""
    with needing("tensorboard", "a log for TensorBoard"):
        import tensorboard.summary.writer.event_file_writer  # noqa: F401  # only tried


class EventWriter:
    """Scalars by name and round, in a new file of a directory, which is made. TensorBoard must be installed."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(directory))

    def add(self, round_number: int, figures: Mapping[str, float]) -> None:
        """Write the figures of one round, counted from 1."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._writer.add_event(Event(step=round_number, summary=Summary(value=values)))

    def close(self) -> None:
        """Write what is still in memory, and close the file."""
        self._writer.close()
