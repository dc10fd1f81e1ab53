"""Time to accuracy: what it took until a run first was as good as was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msfusion.experiment.report.spreads import spread

Metrics = Sequence[Mapping[str, Any]]


def first_reached(metrics: Metrics, accuracy: float, participants: int) -> dict[str, Any]:
    """The rounds, simulated seconds and bytes until a run's accuracy was first at least so high.

    Bytes are all that was sent and received, a mean over the participants. All three are None where the
    accuracy was not reached; seconds are None without a network as well. Rounds without an evaluation cannot
    count, so a target is reached at the first evaluated round at which it shows.
    """
    found: dict[str, Any] = {"accuracy": accuracy, "rounds": None, "simulated_seconds": None, "bytes": None}
    moved, seconds = 0.0, 0.0
    for line in metrics:
        moved += line["bytes_down"] + line["bytes_up"] + line["measuring_bytes"]
        seconds += line.get("simulated_seconds", 0.0)
        if (line.get("accuracy") or 0.0) >= accuracy:
            found |= {"rounds": line["round"], "bytes": moved / participants}
            if "simulated_seconds" in line:
                found["simulated_seconds"] = seconds
            break
    return found


def spread_to(runs: Sequence[Metrics], accuracy: float, participants: int) -> dict[str, Any]:
    """`first_reached` over several runs: how many `reached` it, and the spread of what it took."""
    found = [first_reached(metrics, accuracy, participants) for metrics in runs]
    spreads = {key: spread([run[key] for run in found]) for key in ("rounds", "simulated_seconds", "bytes")}
    return {"accuracy": accuracy, "reached": sum(run["rounds"] is not None for run in found), **spreads}
