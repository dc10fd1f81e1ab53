"""What a run asks of each participant, from `msfusion.costs`, as plain values (JSON)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from msfusion.costs import Costs, inference_flops
from msfusion.experiment.setup import Setup
from msfusion.windows import EntryCoverage


def coverage_by_round(setup: Setup) -> list[float] | None:
    """The share of the model's entries that somebody will have trained after each round; None for `small`.

    Who is absent or too late counts for nothing. (The small model is trained whole, but no full model ever
    is.) Where feedback sets the overlap, with that of the first round.
    """
    if not setup.covers:
        return None
    reached = Reached(setup)
    shares = []
    for index in range(setup.config.rounds):
        attendance = setup.calendar.round(index)
        shares.append(
            reached.after(index, attendance.on_time, setup.method.overlap(index), attendance.arriving)
        )
        if shares[-1] == 1:  # and so it stays
            break
    return shares + [1.0] * (setup.config.rounds - len(shares))


class Reached:
    """Entry coverage of a run as it goes on."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._entries = EntryCoverage(setup.width_map)

    def after(
        self,
        round_index: int,
        participants: Sequence[int],
        overlap: float | None,
        arriving: Sequence[Sequence[int]] = (),
    ) -> float:
        """The share of the model's entries that somebody has held in this round or one before.

        `arriving` are late updates that are merged in it, as (participant, round in which it was cut).
        """
        window = self._setup.window
        held = [window(round_index, participant, overlap) for participant in participants]
        return self._entries.add([*held, *(window(began, participant) for participant, began in arriving)])


def run_figures(setup: Setup) -> dict[str, Any]:
    """For each participant and for the full model: parameters, FLOPs, memory and bytes. Raises MsfusionError.

    Nothing is trained. `share` is of the full model's parameters; FLOPs are those of training on one example;
    memory and bytes in bytes, the latter for each round in which the participant takes part. Where a
    participant's ratio changes, `ratio` and the figures are its largest, and `by_ratio` has all. `trained_model` is
    what is evaluated and exported: its parameters, and the FLOPs with which it answers one example. `start`: how
    msfusion begins, where that was left open, and why.
    """
    full = setup.full_costs
    participants = []
    for participant, own in enumerate(setup.data.participants):
        figures = [
            {"ratio": ratio, **_figures(setup.costs(ratio), full)}
            for ratio in setup.capacities.possible(participant)
        ]
        row = {"participant": participant, "examples": len(own), **figures[0]}
        participants.append(row if len(figures) == 1 else {**row, "by_ratio": figures})
    return {
        "participants": participants,
        "full_model": _figures(full, full),
        "trained_model": _trained_model(setup),
        **_start(setup),
    }


def _start(setup: Setup) -> dict[str, Any]:
    if setup.why_start is None:
        return {}
    return {"start": {"chosen": setup.config.method.start, "why": setup.why_start}}


def _trained_model(setup: Setup) -> dict[str, int]:
    model = setup.method.whole if setup.method.trains_own_models else setup.model
    return {
        "parameters": sum(each.numel() for each in model.parameters() if each.requires_grad),
        "inference_flops_per_example": inference_flops(model, setup.data.participants[0]),
    }


def mean_flops_per_example(setup: Setup) -> float:
    """Training FLOPs per example, a mean over the participants and their ratios. Raises MsfusionError."""
    return statistics.fmean(
        statistics.fmean(figures["flops_per_example"] for figures in row.get("by_ratio", [row]))
        for row in run_figures(setup)["participants"]
    )


def _figures(costs: Costs, full: Costs) -> dict[str, Any]:
    return {
        "parameters": costs.parameters,
        "share": costs.parameters / full.parameters,
        "flops_per_example": costs.flops_per_example,
        "peak_memory": costs.peak_memory,
        "bytes_down": costs.bytes_down,
        "bytes_up": costs.bytes_up,
    }
