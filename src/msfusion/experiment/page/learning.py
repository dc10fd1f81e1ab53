"""How good the models became: learning curves, with what a guess and the small model reach."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from msfusion.experiment.page.reading import Cell, Run, item, number, tested_on, whole
from msfusion.experiment.report.spreads import spread
from msfusion.federated.problem import METHODS
from msfusion.methods import HOUSE
from msfusion.quoting import short

Section = dict[str, Any]
"""A part of the page: `id`, `title`, `text`, `charts` and `tables`, all plain values (JSON)."""

MOST_POINTS = 400
"""Of one line: a chart is not wider."""
MOST_OWN_METRICS = 12
MOST_COLUMNS = 100
"""Of a table of fields."""
MOST_NAMED = 64
"""Classes that have a row."""

_NAMES = {
    "accuracy": ("Accuracy on {tested}", "percent"),
    "own_accuracy": ("Accuracy in participants' own proportions of labels", "percent"),
    "perplexity": ("Perplexity on {tested}", "plain"),
    "loss": ("Loss on {tested}", "plain"),
    "training_loss": ("Loss in training", "plain"),
}


def significant(value: float | None) -> float | None:
    """A number with six digits: more cannot be seen."""
    return None if value is None else float(f"{value:.6g}")


def is_floor(method: str) -> bool:
    """Whether a method is what the others have to be better than. No code of others is asked."""
    return method in HOUSE and METHODS[method].role == "floor"


def learning(cells: Sequence[Cell]) -> Section | None:
    """The learning curves of all methods, a chart for each figure; None where no round is done."""
    charts, tested = [], tested_on([run for cell in cells for run in cell.runs])
    for key, (title, form) in _NAMES.items():
        chart = _chart(cells, key, title.format(tested=tested), form)
        if chart is not None:
            charts.append(chart)
    for name in _own_metrics(cells):
        chart = _chart(cells, name, short(name), "plain", own=True)
        if chart is not None:
            charts.append(chart)
    if not charts:
        return None
    seeds = max(len(cell.runs) for cell in cells)
    text = "One line for each method, by the number of rounds that are done."
    if seeds > 1:
        text += (
            " A line is the mean over the seeds, and the band around it one standard deviation to each side."
        )
    if any(is_floor(cell.runs[0].method) for cell in cells):
        text += " The dashed line is the small model, which every participant could train alone."
    if any(chart["rules"] for chart in charts):
        text += " The dotted line is what a model reaches that guesses."
    return {"id": "learning", "title": "Learning curves", "text": text, "charts": charts}


def figure_by_rounds(run: Run, key: str, title: str, form: str, name: str) -> dict[str, Any] | None:
    """A chart with the line of one figure of a run; None where no round tells it. `name` is what the line is called."""
    points = [(line["round"], number(line.get(key))) for line in run.lines]
    known = [(index, value) for index, value in points if value is not None]
    known = known[:: max(1, -(-len(known) // MOST_POINTS))]
    if not known:
        return None
    series = {
        "name": name,
        "x": [each for each, _ in known],
        "y": [significant(value) for _, value in known],
    }
    x, y = {"label": "rounds", "form": "whole"}, {"label": title, "form": form, "zero": True}
    return {"kind": "lines", "title": title, "x": x, "y": y, "series": [series], "rules": []}


def by_class(cell: Cell) -> Section | None:
    """How much of each class the first run of a cell tells rightly, round by round; None where that is not known."""
    run = cell.runs[0]
    known = [
        (line["round"], line["by_class"]) for line in run.lines if isinstance(line.get("by_class"), list)
    ]
    if not known:
        return None
    classes = min(MOST_NAMED, *(len(shares) for _, shares in known))
    table = [[number(shares[each]) for _, shares in known] for each in range(classes)]
    names = _class_names(run, classes)
    told = [(share, name) for row, name in zip(table, names, strict=True) if (share := row[-1]) is not None]
    text = (
        "A row is a class. The fuller a field, the more of the test examples of the class are told rightly."
    )
    if told:
        (low, worst), (high, best) = min(told), max(told)
        text += (
            f" At the end it is {high:.1%} of '{best}', the most, and {low:.1%} of '{worst}', the least."
            if low < high
            else f" At the end it is {high:.1%} of each that is tested."
        )
    title = "Test examples that are told rightly"
    chart = by_rounds(
        title, ("class", names), [each for each, _ in known], table, "of its examples", "percent"
    )
    return {"id": "classes", "title": "Class by class", "text": text, "charts": [chart]}


def _class_names(run: Run, count: int) -> list[str]:
    names = item(run.about, "labels", "names") or item(run.about, "label_names")  # so older runs have them
    given = names if isinstance(names, list) and len(names) >= count else range(count)
    return [short(each, 40) for each in given[:count]]


def by_rounds(
    title: str,
    rows: tuple[str, Sequence[str]],
    rounds: Sequence[int],
    table: Sequence[Sequence[float | None]],
    label: str,
    form: str = "plain",
) -> dict[str, Any]:
    """A chart of fields: a row for each of `rows` (what they are, and their names), a column for each round.

    Where there are more rounds than can be seen, several share a column, as a mean. `label` says what the numbers are.
    """
    step = max(1, -(-len(rounds) // MOST_COLUMNS))
    return {
        "kind": "cells",
        "title": title,
        "x": {"label": "round" if step == 1 else f"round, {step} to a column"},
        "y": {"label": rows[0]},
        "rows": list(rows[1]),
        "columns": [str(each) for each in rounds[::step]],
        "values": [[_mean(row[at : at + step]) for at in range(0, len(row), step)] for row in table],
        "label": label,
        "form": form,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return significant(statistics.fmean(known)) if known else None


def _own_metrics(cells: Sequence[Cell]) -> list[str]:
    names: dict[str, None] = {}
    for cell in cells:
        for run in cell.runs:
            for line in run.lines[-1:]:
                found = line.get("metrics")
                names.update(dict.fromkeys(found if isinstance(found, dict) else ()))
    return list(names)[:MOST_OWN_METRICS]


def _chart(
    cells: Sequence[Cell], key: str, title: str, form: str, own: bool = False
) -> dict[str, Any] | None:
    series, notes = [], []
    for cell in cells:
        lines = [_figures(run, key, own) for run in cell.runs]
        gone = sorted({each["round"] for found in lines for each in found if each[key] is None})
        if gone:
            notes.append(f"{cell.name}: not finite in {_rounds(gone)}")
        with_rounds = [found for found in lines if any(each[key] is not None for each in found)]
        if not with_rounds:
            continue
        series.append({"name": cell.name, "dashed": is_floor(cell.runs[0].method), **_line(with_rounds, key)})
    if not series:
        return None
    return {
        "kind": "lines",
        "title": title,
        "x": {"label": "rounds", "form": "whole"},
        "y": {"label": title, "form": form},
        "series": series,
        "rules": _guess(cells, key),
        "notes": notes,
    }


def _figures(run: Run, key: str, own: bool) -> list[dict[str, Any]]:
    """The figure of each round that has one; None where it is not finite."""
    found = []
    for line in run.lines:
        where = line.get("metrics") if own else line
        if isinstance(where, dict) and key in where:
            found.append({"round": line["round"], key: number(where[key])})
    return found


def _line(runs: Sequence[Sequence[dict[str, Any]]], key: str) -> dict[str, list[int | float | None]]:
    """Mean and band of several runs over the rounds that all have, not more points than can be seen.

    There is a gap where a figure of any of them is not finite.
    """
    by_round = [{line["round"]: line[key] for line in run} for run in runs]
    rounds = sorted(set.intersection(*map(set, by_round)))
    step = max(1, -(-len(rounds) // MOST_POINTS))
    rounds = sorted({*rounds[::step], *rounds[-1:]})
    spreads = [spread([values[number] for values in by_round]) for number in rounds]
    line: dict[str, list[int | float | None]] = {
        "x": [*rounds],
        "y": [significant(each["mean"]) for each in spreads],
    }
    if any(each["sd"] is not None for each in spreads):
        for name, sign in (("low", -1), ("high", 1)):
            line[name] = [
                None if each["sd"] is None else significant(each["mean"] + sign * each["sd"])
                for each in spreads
            ]
    return line


def _guess(cells: Sequence[Cell], key: str) -> list[dict[str, Any]]:
    """What a model reaches that takes every class for equally likely, where all runs have as many classes."""
    classes = {whole(run.about.get("classes")) for cell in cells for run in cell.runs}
    tasks = {item(run.about, "task") for cell in cells for run in cell.runs}
    count = classes.pop() if len(classes) == 1 else None
    if count is None or count < 2 or tasks != {"classification"}:
        return []
    if key == "accuracy":
        return [{"name": f"a guess, {1 / count:.1%}", "y": significant(1 / count)}]
    if key == "loss":
        return [{"name": f"a guess, {math.log(count):.3g}", "y": significant(math.log(count))}]
    return []


def _rounds(numbers: Sequence[int]) -> str:
    """Some rounds in words, the first few of them."""
    shown = ", ".join(map(str, numbers[:8]))
    word = "round" if len(numbers) == 1 else "rounds"
    return f"{word} {shown}" + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
