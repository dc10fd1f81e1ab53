"""What it took: quality against the bytes, the FLOPs and the memory of a participant, and what crossed each round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from msfusion.experiment.page.learning import MOST_POINTS, Section, figure_by_rounds, is_floor, significant
from msfusion.experiment.page.reading import (
    Cell,
    Run,
    item,
    number,
    participants_of,
    rows_of,
    tested_on,
    whole,
)

_BYTES = {"label": "bytes of a participant so far", "form": "bytes"}
_FLOPS = {"label": "training FLOPs of a participant so far", "form": "count"}
_MEMORY = {"label": "peak memory of a participant", "form": "bytes"}

_TRAFFIC = {
    "bytes_down": "sent to participants",
    "bytes_up": "sent by participants",
    "measuring_bytes": "for evaluations",
}
_CROSSING = {
    "activations_bytes": "activations, as sent",
    "plain_activations_bytes": "activations, without the codec",
    "gradients_bytes": "gradients, as sent",
    "plain_gradients_bytes": "gradients, without the codec",
}


_DASHED = ("bytes_up", "plain_activations_bytes", "plain_gradients_bytes")
"""Lines that often lie upon others."""


def quality_of(cells: Sequence[Cell]) -> tuple[str, dict[str, str]] | None:
    """The figure by which the runs are judged, and its axis; None where nothing was evaluated."""
    runs = [run for cell in cells for run in cell.runs]
    lines = [line for run in runs for line in run.lines]
    for key, form in (("perplexity", "plain"), ("accuracy", "percent"), ("loss", "plain")):
        if any(number(line.get(key)) is not None for line in lines):
            return key, {"label": f"{key} on {tested_on(runs)}", "form": form}
    return None


def spending(cells: Sequence[Cell]) -> Section | None:
    """Quality against cost; None where nothing was evaluated."""
    judged = quality_of(cells)
    if judged is None:
        return None
    key, axis = judged
    charts = []
    for title, x, spent in (
        ("Against bytes", _BYTES, bytes_by_round),
        ("Against computation", _FLOPS, flops_by_round),
    ):
        series = [_path(cell, key, spent) for cell in cells]
        shown = [each for each in series if each["x"]]
        if shown:
            charts.append({"kind": "lines", "title": title, "x": x, "y": axis, "series": shown, "rules": []})
    points = [
        {"name": cell.name, "x": memory, "y": best}
        for cell in cells
        for run in cell.runs
        if (memory := memory_of(run)) is not None and (best := _last(run, key)) is not None
    ]
    if len(cells) > 1 and points:
        title = "Against memory, at the end"
        charts.append({"kind": "points", "title": title, "x": _MEMORY, "y": axis, "points": points})
    text = (
        "Further left is cheaper. Bytes are all that a participant receives and sends, in the mean over the "
        "participants, and FLOPs those of its training."
    )
    if len(cells) > 1:
        text += " Memory is that of the participant that needs most; each run has a point."
    return {"id": "costs", "title": "Quality against cost", "text": text, "charts": charts}


def bytes_by_round(run: Run) -> list[float | None]:
    """What crossed in each round, both ways, a mean over the participants."""
    moved = [
        [number(line.get(name)) or 0.0 for name in _TRAFFIC] if "bytes_down" in line else None
        for line in run.lines
    ]
    return [None if each is None else sum(each) / max(1, run.count) for each in moved]


def flops_by_round(run: Run) -> list[float | None]:
    """What was computed in training in each round, a mean over the participants; None where that is not known.

    It is the method's own count where its rounds differ, else examples times FLOPs for each, of everybody who trained.
    """
    people = {whole(row.get("participant")): row for row in rows_of(run.summary, "participants")}
    seen = item(run.about, "examples_per_round")
    found: list[float | None] = []
    for line in run.lines:
        spent = number(line.get("training_flops"))
        if spent is None:
            each = [
                _flops_of(people.get(who), seen, who)
                for who in (*participants_of(line), *participants_of(line, "late"))
            ]
            known = [one for one in each if one is not None]
            spent = sum(known) if each and len(known) == len(each) else None
        found.append(None if spent is None else spent / max(1, run.count))
    return found


def _flops_of(row: dict[str, Any] | None, seen: object, who: int) -> float | None:
    """Of one participant's round; not known where its width changes from round to round."""
    if row is None or "by_ratio" in row or not isinstance(seen, list) or who >= len(seen):
        return None
    examples, each = number(seen[who]), number(row.get("flops_per_example"))
    return None if examples is None or each is None else examples * each


def memory_of(run: Run) -> float | None:
    """The peak memory of the participant that needs most."""
    found = [number(row.get("peak_memory")) for row in rows_of(run.summary, "participants")]
    return max((each for each in found if each is not None), default=None)


def _last(run: Run, key: str) -> float | None:
    return next((each for each in reversed(run.series(key)) if each is not None), None)


def _path(cell: Cell, key: str, spent_by: Any) -> dict[str, Any]:
    """Quality after each round over what was spent until then, a mean over the seeds."""
    paths: list[dict[int, tuple[float, float]]] = []
    for run in cell.runs:
        total, path = 0.0, {}
        for line, spent in zip(run.lines, spent_by(run), strict=True):
            if spent is None:
                break
            total += spent
            value = number(line.get(key))
            if value is not None:
                path[line["round"]] = (total, value)
        paths.append(path)
    rounds = sorted(set.intersection(*map(set, paths))) if paths else []
    rounds = rounds[:: max(1, -(-len(rounds) // MOST_POINTS))]
    return {
        "name": cell.name,
        "dashed": is_floor(cell.runs[0].method),
        "x": [significant(statistics.fmean(path[each][0] for path in paths)) for each in rounds],
        "y": [significant(statistics.fmean(path[each][1] for path in paths)) for each in rounds],
    }


def traffic(cell: Cell) -> Section | None:
    """What crossed in each round of the first run of a cell; None where it is not told."""
    run = cell.runs[0]
    charts = [
        _stacked(run, "All messages", _TRAFFIC),
        _stacked(run, "What crosses the cut", _CROSSING, log=True),
        figure_by_rounds(run, "codec_error", "Error of the codec", "plain", "error"),
    ]
    shown = [chart for chart in charts if chart is not None]
    if not shown:
        return None
    text = "Bytes of each round, summed over the participants."
    text += _saved(run)
    if any(run.series("codec_error")):
        text += (
            " The error of the codec is how far a participant's message is from what it had to send (0: as it was, 1: "
            "nothing of it), in the mean over the participants"
        )
        split = any(run.series("activations_bytes"))
        text += (
            ": of its activations, which are not sent again." if split else "; what is missing is sent later."
        )
    return {"id": "traffic", "title": "Messages", "text": text, "charts": shown}


def _saved(run: Run) -> str:
    """How many times less the codecs made what crosses the cut of a split model."""
    words = []
    for kind in ("activations", "gradients"):
        sent, plain = (
            sum(each for each in run.series(f"{start}{kind}_bytes") if each is not None)
            for start in ("", "plain_")
        )
        if sent and plain:
            words.append(f"{kind} take {plain / sent:.1f} times fewer bytes")
    return f" With the codecs {' and '.join(words)}." if words else ""


def _stacked(run: Run, title: str, names: dict[str, str], log: bool = False) -> dict[str, Any] | None:
    series = []
    step = max(1, -(-len(run.lines) // MOST_POINTS))
    for key, name in names.items():
        values = run.series(key)[::step]
        if any(values):
            rounds = [line["round"] for line in run.lines][::step]
            series.append({"name": name, "dashed": key in _DASHED, "x": rounds, "y": values})
    if not series:
        return None
    y = {"label": "bytes in a round", "form": "bytes", "log": log, "zero": not log}
    x = {"label": "rounds", "form": "whole"}
    return {"kind": "lines", "title": title, "x": x, "y": y, "series": series, "rules": []}
