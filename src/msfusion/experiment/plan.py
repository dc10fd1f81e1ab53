"""What a run will ask of each participant, known before anything is trained."""

from __future__ import annotations

from typing import Any

from msfusion.experiment.figures import coverage_by_round, run_figures
from msfusion.experiment.setup import Setup
from msfusion.experiment.simulated import planned_attendance, planned_seconds
from msfusion.federated.protected import planned_privacy
from msfusion.methods.copies import CopiesMethod


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
        **copies_of(setup),
        "entry_coverage": coverage_by_round(setup),
        **({} if seconds is None else {"simulated_seconds": seconds}),
        "attendance": planned_attendance(setup),
        **_privacy(setup),
        **run_figures(setup),
    }


def _privacy(setup: Setup) -> dict[str, Any]:
    """What differential privacy the run will spend, if everybody who is there stays; nothing without noise."""
    rounds = [setup.calendar.round(index).on_time for index in range(setup.config.rounds)]
    planned = planned_privacy(setup.method, rounds)
    return {"privacy": planned} if planned else {}


def copies_of(setup: Setup) -> dict[str, Any]:
    """Under "copies": from which round on they may come apart, the groups of which less is held, and what is inexact.

    `held` has for each ratio, by group, the units held, those that the ratio asks for, and all. Nothing for others.
    """
    method = setup.method
    if not isinstance(method, CopiesMethod):
        return {}
    people = range(setup.config.participants.count)
    ratios = sorted({ratio for each in people for ratio in setup.capacities.possible(each)})
    held = {
        f"{ratio:g}": {name: list(units) for name, units in method.rounded(ratio).items()} for ratio in ratios
    }
    copies = {
        "from_round": method.settings.from_round,
        "apart": method.settings.apart,
        "held": {ratio: groups for ratio, groups in held.items() if groups},
        "difference": method.difference(setup.data.test.take(slice(0, 2))),
        "left_in_operators": list(method.left_in_operators()),
    }
    return {"copies": copies}
