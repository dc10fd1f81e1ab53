"""What `msfusion doctor` found, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from msfusion.experiment.report.table import Column, Row, Table

_COLUMNS = (
    Column("what", "what", align="left"),
    Column("", "state", align="left", whole=True),
    Column("found", "found", align="left"),
    Column("what to do", lambda row: row["remedy"] or None, align="left", missing="", optional=True),
)


def doctor_table(findings: Sequence[Row]) -> Table:
    """All findings; under them, how many should be mended."""
    amiss = sum(row["state"] == "amiss" for row in findings)
    return Table(
        "this machine", _COLUMNS, findings, notes=[f"{amiss} of these should be mended"] if amiss else []
    )
