"""What each participant did and when, and which labels it has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msfusion.experiment.page.learning import MOST_COLUMNS, Section, by_rounds
from msfusion.experiment.page.reading import Cell, Run, item, number, participants_of, rows_of
from msfusion.quoting import short

MOST_PARTICIPANTS = 24
MOST_SPANS = 3000

DOWN, COMPUTE, UP, IDLE, ABSENT, LATE = "receives", "computes", "sends", "waits", "absent", "too late"
KINDS = (DOWN, COMPUTE, UP, IDLE, ABSENT, LATE)

COUNTS, LEFT_OUT, NOT_ASKED = "its work counts", "left out", "not asked"
PARTS = (COUNTS, LATE, ABSENT, LEFT_OUT, NOT_ASKED)


def people(cell: Cell) -> Section | None:
    """Time lines of the first run of a cell; None where nothing says what participants did."""
    run = cell.runs[0]
    shown = min(run.count, MOST_PARTICIPANTS)
    charts: list[dict[str, Any]] = []
    words = []
    clock = time_lines(run, shown)
    if clock is not None:
        charts.append(clock)
        words.append(
            "The time lines are those of the simulated clock: each participant receives, computes, sends, and waits "
            "until the round ends."
        )
    work = working_seconds(run, shown)
    if work is not None:
        charts.append(work)
        words.append(
            "Seconds of work are those that a participant's part of a round really took where it ran; an empty field "
            "is a round in which its work does not count."
        )
    parts = attendance(run, shown)
    if parts is not None:
        charts.append(parts)
    if not charts:
        return None
    if run.count > shown:
        words.append(f"Shown are the first {shown} of {run.count} participants.")
    return {"id": "people", "title": "Participants", "text": " ".join(words), "charts": charts}


def time_lines(run: Run, shown: int) -> dict[str, Any] | None:
    """Who receives, computes, sends, waits, is late or absent, on the simulated clock; None without one.

    Spans are [participant, begin, end, number of the kind], in seconds from the beginning.
    """
    if not any(number(line.get("simulated_seconds")) is not None for line in run.lines):
        return None
    most = max(1, MOST_SPANS // (5 * max(1, shown)))
    spans: list[list[float]] = []
    begin = 0.0
    rounds = []
    for line in run.lines[:most]:
        length = number(line.get("simulated_seconds")) or 0.0
        rounds.append(begin)
        for who in range(shown):
            for kind, start, end in _spans(run, line, who, length):
                if end > start:
                    spans.append([who, _rounded(begin + start), _rounded(begin + end), KINDS.index(kind)])
        begin += length
    more = f", rounds 1 to {most}" if len(run.lines) > most else ""
    return {
        "kind": "spans",
        "title": f"Time lines on the simulated clock{more}",
        "x": {"label": "simulated seconds", "form": "plain"},
        "y": {"label": "participant"},
        "kinds": list(KINDS),
        "rows": shown,
        "rounds": [_rounded(each) for each in rounds],
        "spans": spans,
    }


def _spans(run: Run, line: Mapping[str, Any], who: int, length: float) -> list[tuple[str, float, float]]:
    """What a participant does in a round of so many seconds: kind, begin and end in it."""
    if who in participants_of(line, "absent"):
        return [(ABSENT, 0.0, length)]
    seconds = number(item(line, "simulated_seconds_each", str(who)))
    if seconds is None:
        return []
    if who in participants_of(line, "late"):
        return [(LATE, 0.0, min(seconds, length))]
    down, up = _transfer(run, line, who)
    down, up = min(down, seconds), min(up, max(0.0, seconds - down))
    return [
        (DOWN, 0.0, down),
        (COMPUTE, down, seconds - up),
        (UP, seconds - up, seconds),
        (IDLE, seconds, length),
    ]


def _transfer(run: Run, line: Mapping[str, Any], who: int) -> tuple[float, float]:
    """The seconds in which a participant receives (with the latency of its link) and sends; 0 where not known."""
    machines = rows_of(run.about, "machines")
    machine = machines[who] if who < len(machines) else {}
    present = participants_of(line)
    place = present.index(who) if who in present else -1
    costs = next((row for row in rows_of(run.summary, "participants") if row.get("participant") == who), {})
    found = []
    for way, speed in (("bytes_down", "download_megabits"), ("bytes_up", "upload_megabits")):
        each = item(line, "each", way)
        moved = number(each[place]) if isinstance(each, list) and 0 <= place < len(each) else None
        moved = number(costs.get(way)) if moved is None else moved
        megabits = number(machine.get(speed))
        found.append(0.0 if moved is None or not megabits else moved * 8 / (megabits * 1e6))
    return found[0] + (number(machine.get("latency_seconds")) or 0.0), found[1]


def working_seconds(run: Run, shown: int) -> dict[str, Any] | None:
    """How long each participant's part of each round took, where the lines tell; a mean where rounds share a column."""
    table: list[list[float | None]] = [[] for _ in range(shown)]
    for line in run.lines:
        each, present = item(line, "each", "seconds"), participants_of(line)
        told = dict(zip(present, each, strict=False)) if isinstance(each, list) else {}
        for who, row in enumerate(table):
            row.append(number(told.get(who)))
    if not any(value is not None for row in table for value in row):
        return None
    rounds = [line["round"] for line in run.lines]
    people = ("participant", [str(each) for each in range(shown)])
    return by_rounds("Seconds of work in each round", people, rounds, table, "seconds")


def attendance(run: Run, shown: int) -> dict[str, Any] | None:
    """Whose work counts in which round, and why it does not; None where everybody's always counts."""
    lines = run.lines[:MOST_COLUMNS]
    table = [[_part(line, who) for line in lines] for who in range(shown)]
    if all(part == COUNTS for row in table for part in row):
        return None
    return {
        "kind": "parts",
        "title": "Whose work counts" + (f", rounds 1 to {len(lines)}" if len(run.lines) > len(lines) else ""),
        "x": {"label": "round"},
        "y": {"label": "participant"},
        "kinds": list(PARTS),
        "rows": [str(who) for who in range(shown)],
        "columns": [str(line["round"]) for line in lines],
        "values": [[PARTS.index(part) for part in row] for row in table],
    }


def _part(line: Mapping[str, Any], who: int) -> str:
    if who in participants_of(line):
        return COUNTS
    if any(each.get("participant") == who for each in rows_of(line, "left_out")):
        return LEFT_OUT
    for key, part in (("late", LATE), ("absent", ABSENT)):
        if who in participants_of(line, key):
            return part
    return NOT_ASKED


def labels(cell: Cell) -> Section | None:
    """How many examples of each label every participant has; None where that is not noted."""
    run = cell.runs[0]
    names, counts = item(run.about, "labels", "names"), item(run.about, "labels", "counts")
    if not isinstance(names, list) or not isinstance(counts, list) or not counts:
        return None
    columns = [short(name, 60) for name in names[:64]]
    table = [[number(each) for each in row[: len(columns)]] for row in counts[:64] if isinstance(row, list)]
    chart = {
        "kind": "cells",
        "title": "Examples of each label",
        "x": {"label": "label"},
        "y": {"label": "participant"},
        "rows": [str(who) for who in range(len(table))],
        "columns": columns,
        "values": table,
        "label": "examples",
    }
    text = "How the training examples are shared out. The stronger the colour of a field, the more examples of a label."
    return {"id": "labels", "title": "Who has which labels", "text": text, "charts": [chart]}


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.7g}")
