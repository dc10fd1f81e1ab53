"""What a run has left, but for the seconds that it took: the same wherever and however often it was done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msfusion.experiment.directory import RunDirectory


def metrics_of(path: Path) -> list[dict[str, Any]]:
    """The lines of its rounds."""
    lines = RunDirectory(path).read_metrics()
    return [{**line, "seconds": 0, "each": {**line["each"], "seconds": 0}} for line in lines]


def summary_of(path: Path) -> dict[str, Any]:
    """Its summary."""
    summary = RunDirectory(path).read_summary()
    return {**summary, "seconds": 0, "results": [{**row, "seconds": 0} for row in summary["results"]]}
