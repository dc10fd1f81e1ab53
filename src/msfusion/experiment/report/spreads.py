"""Figures over several seeds: at the end, after each round, and until a run was as good as was asked for."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Metrics = Sequence[Mapping[str, Any]]
"""The lines of a run, one for each round."""

SPENT = ("rounds", "activation_bytes", "gradient_bytes", "all_bytes")
"""What split learning spends until it is as good as without compression."""


def spread(values: Sequence[float | int | None]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for a single value), values; no mean if one is infinite."""
    known = [value for value in values if value is not None]
    complete = len(known) == len(values)
    return {
        "mean": statistics.fmean(known) if complete else None,
        "sd": statistics.stdev(known) if complete and len(known) > 1 else None,
        "values": list(values),
    }


def curve(runs: Sequence[Metrics], key: str) -> dict[str, Any]:
    """Mean and standard deviation over the runs after each round that was evaluated in all of them."""
    by_round = [
        {line["round"]: line[key] for line in metrics if line.get(key) is not None} for metrics in runs
    ]
    rounds = sorted(set.intersection(*(set(values) for values in by_round)))
    spreads = [spread([values[number] for values in by_round]) for number in rounds]
    return {
        "metric": key,
        "rounds": rounds,
        "mean": [each["mean"] for each in spreads],
        "sd": [each["sd"] for each in spreads],
    }


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


def first_as_good(metrics: Metrics, accuracy: float) -> dict[str, Any]:
    """Rounds and bytes (sums over the participants) until a run's accuracy was first at least so high.

    None where it was never. `all_bytes` are everything that crossed: targets and first layers as well.
    """
    spent = dict.fromkeys(SPENT, 0)
    for line in metrics:
        spent["rounds"] = line["round"]
        spent["activation_bytes"] += line["activations_bytes"]
        spent["gradient_bytes"] += line["gradients_bytes"]
        spent["all_bytes"] += line["bytes_down"] + line["bytes_up"]
        if (line.get("accuracy") or 0.0) >= accuracy:
            return dict(spent)
    return dict.fromkeys(SPENT)


def until_as_good(runs: Sequence[Metrics], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """`first_as_good` over several runs: how many `reached` the baseline of their seed less its standard deviation.

    `baseline` is the spread of its final accuracies, in the order of the runs: equal seeds have equal data and first
    weights, so each run is held against its own. Spreads have no mean where a run never got there; `accuracy` is the
    mean of what was to be reached.
    """
    wanted = [accuracy - (baseline["sd"] or 0.0) for accuracy in baseline["values"]]
    found = [first_as_good(metrics, accuracy) for metrics, accuracy in zip(runs, wanted, strict=True)]
    return {
        "accuracy": statistics.fmean(wanted),
        "reached": sum(each["rounds"] is not None for each in found),
        **{key: spread([each[key] for each in found]) for key in SPENT},
    }


def times_less(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float | None]:
    """How many times fewer bytes a row needed than the baseline: of activations, of both ways, of everything."""
    both = ("activation_bytes", "gradient_bytes")
    ratios: dict[str, float | None] = {}
    for name, keys in {"activations": both[:1], "both": both, "all": ("all_bytes",)}.items():
        ours, theirs = ([of[key]["mean"] for key in keys] for of in (row, baseline))
        known = None not in (*ours, *theirs) and sum(ours) and sum(theirs)
        ratios[name] = sum(theirs) / sum(ours) if known else None
    return ratios
