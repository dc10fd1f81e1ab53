"""Predictions as a table, and how good they are as a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msfusion.experiment.report.table import Column, Row, Table
from msfusion.experiment.report.words import percent, quality
from msfusion.scoring import number_told

SHOWN = 20
"""So many predictions fit a terminal."""


def _told(value: str | Sequence[float]) -> str:
    return value if isinstance(value, str) else ", ".join(map(number_told, value))


_COLUMNS = (
    Column("example", "name", align="left"),
    Column("answer", "answer", _told, align="left", optional=True),
    Column("prediction", lambda row: row.get("numbers", row.get("label")), _told, align="left"),
    Column("probability", "probability", percent, optional=True),
)


def prediction_table(predictions: Sequence[Row], written: bool = False) -> Table:
    """The first predictions, and how many more there are; `written`: all of them are in a file already."""
    more = len(predictions) - SHOWN
    notes = (
        [f"{more:,} more" + ("." if written else ": --out FILE.csv writes all of them.")] if more > 0 else []
    )
    return Table("predictions", _COLUMNS, predictions[:SHOWN], notes=notes)


def evaluation_line(evaluation: Mapping[str, Any]) -> str:
    """How good the predictions are: `accuracy 97.5%, loss 0.0812 on 360 examples with answers`."""
    return f"{quality(evaluation)} on {evaluation['examples']:,} examples with answers"
