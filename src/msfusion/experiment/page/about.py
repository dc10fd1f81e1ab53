"""What a run notes for its page when it begins: what its other files do not tell.

`about.json` holds versions and machine, what the data is, how labels are shared out, and who holds which units when.
Results depend on none of it. A run without the file is complete; its page has fewer parts.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from msfusion.errors import MsfusionError
from msfusion.experiment.environment import environment
from msfusion.experiment.prepared import Prepared
from msfusion.experiment.report.picture import shown_groups
from msfusion.experiment.setup import Setup
from msfusion.experiment.simulated import arrivals
from msfusion.experiment.slices import SlicesRun
from msfusion.files import write_text
from msfusion.objectives import MOST_CLASSES
from msfusion.width.groups import WidthMap, Window, held
from msfusion.windows import EntryCoverage, Feedback

ABOUT = "about.json"

MOST_PARTICIPANTS = 24
"""Whose windows are kept: what one can tell apart in a picture."""
MOST_WINDOWS = 2000
"""Participants times rounds that are looked at, from the first round on."""
MOST_GROUPS = 3
MOST_LAYERS = 16
MOST_UNITS = 4096
MOST_LABELS = 64


def note(prepared: Prepared, path: Path, lines: Sequence[dict[str, Any]] | None = None) -> None:
    """Write `about.json` into a run's directory, unless it is there. Whatever fails leaves the run as it is.

    `lines` are the metrics of a run that has ended: what they decide (an overlap that follows feedback) is added.
    """
    setup = prepared.setup if isinstance(prepared, SlicesRun) else None
    follows = setup is not None and setup.covers and isinstance(setup.config.overlap, Feedback)
    try:
        if lines is None and not (path / ABOUT).exists():
            _write(path, about(prepared))
        elif lines is not None and setup is not None and follows:
            noted = json.loads((path / ABOUT).read_text(encoding="utf-8"))
            _write(path, {**noted, "windows": windows_of(setup, lines)})
    except (MsfusionError, OSError, ValueError, RuntimeError):
        return


def _write(path: Path, noted: dict[str, Any]) -> None:
    write_text(path / ABOUT, json.dumps(noted, separators=(",", ":"), allow_nan=False) + "\n")


def about(prepared: Prepared) -> dict[str, Any]:
    """What there is to note of a run, as plain values (JSON)."""
    data, setup = prepared.data, prepared.setup if isinstance(prepared, SlicesRun) else None
    training = prepared.config.training_settings
    noted: dict[str, Any] = {
        "environment": environment(),
        "task": data.task,
        "classes": data.classes,
        "examples_per_round": [sum(training.batch_sizes(len(own))) for own in data.participants],
    }
    if (labels := _labels(prepared)) is not None:
        noted["labels"] = labels
    if setup is not None:
        if setup.machines is not None:
            noted["machines"] = [asdict(machine) for machine in setup.machines]
        if setup.covers and not isinstance(setup.config.overlap, Feedback):
            noted["windows"] = windows_of(setup)
    return noted


def _labels(prepared: Prepared) -> dict[str, Any] | None:
    """What classes are called, where that is known, and how many examples of each every participant has (`counts`):
    not of data that each participant has of its own.
    """
    data = prepared.data
    counts = None if prepared.config.data.own is not None else data.label_counts()
    counted = counts is not None and max(counts.shape) <= MOST_LABELS
    if not counted and not (data.label_names and len(data.label_names) <= MOST_CLASSES):
        return None
    names = list(data.label_names or map(str, range(data.classes)))
    return {"names": names, "counts": counts.tolist()} if counts is not None and counted else {"names": names}


def windows_of(setup: Setup, lines: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Who holds which units of some groups in the first rounds, and how much of each layer has been held by then.

    `lines` are those of metrics of rounds that are over, where feedback has set the overlap. `groups` have the distinct
    sets of units (`sets`: a bit for each unit, base64) and for each round the number of each participant's (`held`; -1
    for who is absent or late). `coverage` has for each layer the share of its entries that somebody has held, by round.
    """
    count = setup.config.participants.count
    rounds = min(setup.config.rounds, max(1, MOST_WINDOWS // count))
    groups = [each for each in shown_groups(setup.width_map, MOST_GROUPS) if each.units <= MOST_UNITS]
    sets: list[dict[str, int]] = [{} for _ in groups]
    holding: list[list[list[int]]] = [[] for _ in groups]
    layers = _layers(setup.width_map)
    coverage: dict[str, list[float]] = {name: [] for name in layers}
    for index in range(rounds):
        line = lines[index] if index < len(lines) else {}
        windows = _windows(setup, index, line)
        for group, known, rows in zip(groups, sets, holding, strict=True):
            row = [-1] * min(count, MOST_PARTICIPANTS)
            for who in sorted(set(windows) & set(range(len(row)))):
                row[who] = known.setdefault(_bits(held(windows[who], group)), len(known))
            rows.append(row)
        late = [setup.window(began, who) for who, began in arrivals(line)] if line else _late(setup, index)
        for name, reached in layers.items():
            shares = coverage[name]
            shares.append(1.0 if shares[-1:] == [1.0] else reached.add([*windows.values(), *late]))
    return {
        "rounds": rounds,
        "groups": [
            {"name": group.name, "units": group.units, "sets": list(known), "held": rows}
            for group, known, rows in zip(groups, sets, holding, strict=True)
        ],
        "coverage": [
            {"layer": name, "shares": [round(share, 5) for share in shares]}
            for name, shares in coverage.items()
        ],
    }


def _windows(setup: Setup, index: int, line: dict[str, Any]) -> dict[int, Window]:
    """The windows of those who are there in time, or were."""
    on_time = line["participants"] if line else setup.calendar.round(index).on_time
    return {who: setup.window(index, who, line.get("overlap")) for who in on_time}


def _late(setup: Setup, index: int) -> list[Window]:
    """The windows of late updates that are merged in a round."""
    return [setup.window(began, who) for who, began in setup.calendar.round(index).arriving]


def _layers(width_map: WidthMap) -> dict[str, EntryCoverage]:
    """What counts the entries of each layer, of some layers where there are many; a layer is a module with weights."""
    parameters: dict[str, list[str]] = {}
    for name in width_map.parameters:
        parameters.setdefault(name.rpartition(".")[0] or name, []).append(name)
    names = list(parameters)
    step = max(1, -(-len(names) // MOST_LAYERS))
    found = {}
    for name in names[::step]:
        own = parameters[name]
        inside = {group.name for each in own for group, _ in width_map.places.get(each, ())}
        groups = tuple(group for group in width_map.groups if group.name in inside)
        found[name] = EntryCoverage(replace(width_map, parameters=tuple(own), groups=groups))
    return found


def _bits(mask: Bool[Tensor, " units"]) -> str:
    """One bit for each unit, the first unit in the highest bit of the first byte."""
    padded = torch.zeros(-(-len(mask) // 8) * 8, dtype=torch.int64)
    padded[: len(mask)] = mask
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1])
    return base64.b64encode(bytes((padded.view(-1, 8) * weights).sum(1).tolist())).decode()
