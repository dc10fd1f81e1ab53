"""Who took part, and the simulated clock, as plain values (JSON): for metrics, summaries and plans."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from msfusion.experiment.setup import Setup
from msfusion.federated.participation import Attendance


def attendance_figures(attendance: Attendance) -> dict[str, Any]:
    """What a round's line of metrics says of it, where there is something to say.

    `absent` and `late` are participants, `arriving` [participant, round in which it began] of late updates that
    were merged; rounds count from 1, as everywhere in the metrics. `simulated_seconds` are those of the round,
    `simulated_seconds_each` those of everybody who was there.
    """
    line: dict[str, Any] = {}
    for name in ("absent", "late"):
        if getattr(attendance, name):
            line[name] = list(getattr(attendance, name))
    if attendance.arriving:
        line["arriving"] = [[participant, began + 1] for participant, began in attendance.arriving]
    if attendance.duration is not None:
        line["simulated_seconds"] = attendance.duration
        line["simulated_seconds_each"] = {
            str(participant): seconds for participant, seconds in attendance.seconds.items()
        }
    return line


def arrivals(line: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The late updates that were merged in a round, as in `Attendance.arriving`, from its line of metrics."""
    return [(participant, began - 1) for participant, began in line.get("arriving", [])]


def simulated_figures(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The simulated seconds of a whole run; nothing without a network."""
    if "simulated_seconds" not in metrics[0]:
        return {}
    return {"simulated_seconds": sum(line["simulated_seconds"] for line in metrics)}


def planned_attendance(setup: Setup) -> list[dict[str, Any]]:
    """For each participant, in how many rounds it will be on time, late, absent; and its seconds in a round.

    `simulated_seconds` is a mean over the rounds in which it is there; None if that is none.
    """
    rounds = [setup.calendar.round(index) for index in range(setup.config.rounds)]
    rows = []
    for participant in range(setup.config.participants.count):
        row: dict[str, Any] = {
            "participant": participant,
            "rounds_on_time": sum(participant in each.on_time for each in rounds),
            "rounds_late": sum(participant in each.late for each in rounds),
            "rounds_absent": sum(participant in each.absent for each in rounds),
        }
        if setup.machines is not None:
            seconds = [each.seconds[participant] for each in rounds if participant in each.seconds]
            row["simulated_seconds"] = statistics.fmean(seconds) if seconds else None
            row["machine"] = vars(setup.machines[participant])
        rows.append(row)
    return rows


def planned_seconds(setup: Setup) -> float | None:
    """The simulated seconds of the whole run; None without a network."""
    durations = [setup.calendar.round(index).duration for index in range(setup.config.rounds)]
    known = [duration for duration in durations if duration is not None]
    return sum(known) if setup.machines is not None else None
