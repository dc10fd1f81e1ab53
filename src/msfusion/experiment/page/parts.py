"""Which parts of the model were trained: who held which units, how much of each layer, and how models are grown."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from msfusion.errors import MsfusionError
from msfusion.experiment.page.learning import MOST_POINTS, Section, figure_by_rounds, significant
from msfusion.experiment.page.reading import Cell, item, number, rows_of, whole
from msfusion.files import names_in, read_tensor, shape_in
from msfusion.quoting import short

MOST_OPERATORS = 12
MOST_FIELDS = 48
"""Rows and columns of a picture of an operator."""
MOST_ENTRIES = 2**24
"""Of an operator that is drawn."""
_OPERATOR = "operator."


def windows(cell: Cell) -> Section | None:
    """Who held which units in each round, to be stepped through; None where the method has no windows."""
    run = cell.runs[0]
    found = item(run.about, "windows")
    groups = [group for each in rows_of(found, "groups") if (group := _group(each)) is not None]
    if not groups:
        return None
    rounds = len(groups[0]["held"])
    chart: dict[str, Any] = {
        "kind": "windows",
        "title": "Units that each participant holds",
        "groups": groups,
        "rounds": rounds,
        "rows": len(groups[0]["held"][0]),
    }
    text = (
        "A row is a participant, a column a unit of the full model: a channel, a feature or an attention head. Filled "
        "are the units that the participant holds and trains in the round. Step through the rounds with the slider, or "
        "with the arrow keys while it has the focus. Who is absent or late has an empty row."
    )
    more = run.planned is not None and run.planned > rounds
    text += f" Shown are the first {rounds} of {run.planned} rounds." if more else ""
    if chart["rows"] < run.count:
        text += f" Shown are the first {chart['rows']} of {run.count} participants."
    return {"id": "windows", "title": "Who held which units", "text": text, "charts": [chart]}


def _group(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """A group of units as `about.windows_of` notes it; None where it is not of that form."""
    units, sets, held = whole(given.get("units")), given.get("sets"), given.get("held")
    if not units or units > 2**16 or not isinstance(sets, list) or not isinstance(held, list) or not held:
        return None
    if not all(isinstance(each, str) and _bytes_in(each) == -(-units // 8) for each in sets):
        return None
    width = len(held[0]) if isinstance(held[0], list) else 0
    for row in held:
        if not isinstance(row, list) or len(row) != width or not width:
            return None
        if not all(isinstance(each, int) and -1 <= each < len(sets) for each in row):
            return None
    return {"name": short(given.get("name"), 80), "units": units, "sets": sets, "held": held}


def _bytes_in(text: str) -> int:
    try:
        return len(base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError):
        return -1


def coverage(cell: Cell) -> Section | None:
    """How much of the model, and of each layer, somebody has held so far; None where that is not told."""
    run = cell.runs[0]
    charts = []
    told = [(line["round"], number(line.get("entry_coverage"))) for line in run.lines]
    known = [(index, share) for index, share in told if share is not None]
    known = known[:: max(1, -(-len(known) // MOST_POINTS))]
    overall: list[dict[str, Any]] = (
        [{"name": "whole model", "x": [each for each, _ in known], "y": [share for _, share in known]}]
        if known
        else []
    )
    layers: list[dict[str, Any]] = []
    for each in rows_of(item(run.about, "windows"), "coverage"):
        shares = each.get("shares")
        values = [number(share) for share in shares] if isinstance(shares, list) else []
        done = len(run.lines)
        if values[:done]:
            rounds = list(range(1, 1 + min(done, len(values))))
            layers.append({"name": short(each.get("layer"), 60), "x": rounds, "y": values[:done]})
    if not overall and not layers:
        return None
    x, y = (
        {"label": "rounds", "form": "whole"},
        {"label": "share of the entries", "form": "percent", "zero": True},
    )
    shown = layers or overall
    for series in overall if layers else ():
        shown = [{**series, "dashed": True}, *layers]
    title = "Entries that somebody has held"
    charts.append({"kind": "lines", "title": title, "x": x, "y": y, "series": shown, "rules": []})
    text = (
        "An entry of a weight that no participant has held in any round is still what it was at the beginning. The "
        "lines say how much of each layer somebody has held, in this round or one before."
    )
    if layers and overall:
        text += " The dashed line is the whole model."
    return {"id": "coverage", "title": "Coverage", "text": text, "charts": charts}


def apart(cell: Cell) -> Section | None:
    """How far the participants' models lie apart, and how far windows overlap, where the lines of metrics tell."""
    run = cell.runs[0]
    charts = []
    for key, title, form in (
        ("accuracy_sd", "Standard deviation of accuracy between participants", "percent"),
        ("loss_sd", "Standard deviation of loss between participants", "plain"),
        ("overlap", "Overlap of windows", "percent"),
    ):
        if (chart := figure_by_rounds(run, key, title, form, cell.name)) is not None:
            charts.append(chart)
    if not charts:
        return None
    return {
        "id": "apart",
        "title": "How far apart",
        "text": "What participants have in common, and how far their models differ, round by round.",
        "charts": charts,
    }


def growth(cell: Cell) -> Section | None:
    """The growth operators of a finished run of Fed-Grow as heat maps; None where the run has learnt none."""
    run = cell.runs[0]
    path = run.path / "model.safetensors"
    if not run.summary or path.is_symlink() or not path.is_file():
        return None
    try:
        names = [name for name in names_in(path) if name.startswith(_OPERATOR)]
        names = names[:: max(1, -(-len(names) // MOST_OPERATORS))]
        charts = [chart for name in names if (chart := _operator(path, name)) is not None]
    except (MsfusionError, OSError, ValueError, RuntimeError):
        return None
    if not charts:
        return None
    return {
        "id": "growth",
        "title": "Growth operators",
        "text": (
            "What the participants have learnt together: how each unit (or layer) of the grown model, a row, is made "
            "of those of the smaller one, the columns. Blue is added, red is taken away."
        ),
        "charts": [{"kind": "choice", "title": "Operators", "charts": charts}],
    }


def _operator(path: Path, name: str) -> dict[str, Any] | None:
    shape = shape_in(path, name)  # before a tensor that is larger than the memory is read
    if len(shape) != 2 or not 0 < math.prod(shape) <= MOST_ENTRIES:
        return None
    matrix = read_tensor(path, name)
    if not matrix.is_floating_point():
        return None
    shown = _pooled(matrix.float())
    rows, columns = (each // small for each, small in zip(matrix.shape, shown.shape, strict=True))
    mean = "" if shown.shape == matrix.shape else ", neighbours in the mean"
    return {
        "kind": "cells",
        "title": f"{short(name.removeprefix(_OPERATOR), 80)}: {matrix.shape[0]} by {matrix.shape[1]}{mean}",
        "x": {"label": "of the smaller model"},
        "y": {"label": "of the grown model"},
        "rows": [str(rows * each) for each in range(shown.shape[0])],
        "columns": [str(columns * each) for each in range(shown.shape[1])],
        "values": [[significant(number(value)) for value in row] for row in shown.tolist()],
        "label": "weight",
        "signed": True,
    }


def _pooled(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "fewer narrower"]:
    """Not more rows and columns than can be seen; each is the mean of those that it stands for."""
    rows, columns = (min(MOST_FIELDS, length) for length in matrix.shape)
    return torch.nn.functional.adaptive_avg_pool2d(matrix[None, None], (rows, columns))[0, 0]
