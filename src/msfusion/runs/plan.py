"""What a run will ask of each participant, known before anything is trained."""

from __future__ import annotations

from typing import Any

from msfusion.runs.figures import coverage_by_round, run_figures
from msfusion.runs.setup import Setup
from msfusion.runs.simulated import planned_attendance, planned_seconds


def plan_run(setup: Setup) -> dict[str, Any]:
    """Costs of each participant and of the full model, and entry coverage by round, as plain values (JSON).

    `entry_coverage` has one share for each round: the entries that somebody held in it or before; None for
    `small`, which trains no full model. `attendance` says of each participant in how
    many rounds it will be on time, late and absent, and its simulated seconds: those that the run will have.
    """
    config, seconds = setup.config, planned_seconds(setup)
    return {
        "method": config.method.name,
        "rounds": config.rounds,
        "data": setup.data.description,
        "reach": setup.width_map.reach(),
        "checkpointing": list(setup.width_map.checkpointing),
        "entry_coverage": coverage_by_round(setup),
        **({} if seconds is None else {"simulated_seconds": seconds}),
        "attendance": planned_attendance(setup),
        **run_figures(setup),
    }
