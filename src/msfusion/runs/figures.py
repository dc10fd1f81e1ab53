"""What a run asks of each participant, from `msfusion.costs`, as plain values (JSON)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from torch import nn

from msfusion.costs import Costs
from msfusion.methods.small import SmallMethod
from msfusion.runs.setup import Setup, training_costs
from msfusion.windows import EntryCoverage


def coverage_by_round(setup: Setup) -> list[float] | None:
    """The share of the model's entries that somebody will have held after each round; None for `small`.

    (The small model is trained whole, but no full model ever is.) Where feedback sets the overlap, with that
    of the first round.
    """
    if isinstance(setup.method, SmallMethod):
        return None
    reached = Reached(setup)
    return [
        reached.after(index, present, setup.overlap(index)) for index, present in enumerate(setup.present())
    ]


class Reached:
    """Entry coverage of a run as it goes on."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._entries = EntryCoverage(setup.width_map)

    def after(self, round_index: int, participants: Iterable[int], overlap: float | None) -> float:
        """The share of the model's entries that somebody has held in this round or one before."""
        window = self._setup.window
        return self._entries.add([window(round_index, participant, overlap) for participant in participants])


def run_figures(setup: Setup) -> dict[str, Any]:
    """For each participant and for the full model: parameters, FLOPs, memory and bytes. Raises MsfusionError.

    Nothing is trained. `share` is of the full model's parameters; FLOPs are those of training on one example;
    memory and bytes in bytes, the latter for each round in which the participant takes part.
    """
    full = _costs(setup, setup.model)
    known: dict[float, Costs] = {}
    participants = []
    for participant, ratio in enumerate(setup.config.participants.ratios):
        if ratio not in known:
            known[ratio] = _costs(setup, setup.participant_model(participant))
        examples = len(setup.data.participants[participant])
        row = {"participant": participant, "ratio": ratio, "examples": examples}
        participants.append(row | _figures(known[ratio], full))
    return {"participants": participants, "full_model": _figures(full, full)}


def mean_flops_per_example(setup: Setup) -> float:
    """Training FLOPs per example, a mean over the participants. Raises MsfusionError."""
    return statistics.fmean(row["flops_per_example"] for row in run_figures(setup)["participants"])


def _costs(setup: Setup, model: nn.Module) -> Costs:
    return training_costs(model, setup.data, setup.config.training_settings)


def _figures(costs: Costs, full: Costs) -> dict[str, Any]:
    return {
        "parameters": costs.parameters,
        "share": costs.parameters / full.parameters,
        "flops_per_example": costs.flops_per_example,
        "peak_memory": costs.peak_memory,
        "bytes_down": costs.bytes_down,
        "bytes_up": costs.bytes_up,
    }
