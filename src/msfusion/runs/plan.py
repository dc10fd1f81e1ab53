"""What a run will ask of each participant, known before anything is trained."""

from __future__ import annotations

from typing import Any

from msfusion.runs.figures import coverage_by_round, run_figures
from msfusion.runs.setup import Setup
from msfusion.runs.simulated import planned_attendance, planned_seconds


def plan_run(setup: Setup) -> dict[str, Any]:
    """Costs of each participant and of the full model, and entry coverage by round, as plain values (JSON).

    `entry_coverage` has one share for each round: the entries that somebody held in it or before; None for
    `small`, which trains no full model. Absence, lateness and simulated seconds are those that the run will have.
    """
    config, figures, seconds = setup.config, run_figures(setup), planned_seconds(setup)
    rows = zip(figures["participants"], planned_attendance(setup), strict=True)
    return {
        "method": config.method.name,
        "rounds": config.rounds,
        "data": setup.data.description,
        "reach": setup.width_map.reach(),
        "entry_coverage": coverage_by_round(setup),
        **({} if seconds is None else {"simulated_seconds": seconds}),
        **figures,
        "participants": [costs | attendance for costs, attendance in rows],
    }
