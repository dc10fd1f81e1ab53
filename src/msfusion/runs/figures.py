"""What a run asks of each participant, from `msfusion.costs`, as plain values (JSON)."""

from __future__ import annotations

from typing import Any

from msfusion.methods.table import METHODS
from msfusion.runs.setup import Setup
from msfusion.windows import coverage


def coverage_by_round(setup: Setup) -> list[float] | None:
    """The share of the model's entries that somebody has held after each round; None for `small`.

    (The small model is trained whole, but no full model ever is.)
    """
    schedule = METHODS[setup.config.method.name]
    if schedule is None:
        return None
    present = setup.present()
    return coverage(
        setup.width_map,
        schedule,
        setup.config.participants.ratios,
        setup.config.rounds,
        seed=setup.config.seed,
        present=lambda round_index: present[round_index],
    )


def run_figures(setup: Setup) -> dict[str, Any]:
    """STUB until costs."""
    full = {
        "parameters": 1,
        "share": 1.0,
        "flops_per_example": 1,
        "peak_memory": 1,
        "bytes_down": 1,
        "bytes_up": 1,
    }
    return {
        "participants": [
            {"participant": i, "ratio": r, "examples": len(d), **full}
            for i, (r, d) in enumerate(
                zip(setup.config.participants.ratios, setup.data.participants, strict=True)
            )
        ],
        "full_model": full,
    }


def mean_flops_per_example(setup: Setup) -> float:
    """STUB."""
    return 1.0
