"""Figures over several seeds: mean and standard deviation, at the end and after each round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def spread(values: Sequence[float | int | None]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for a single value), values; no mean if one is infinite."""
    known = [value for value in values if value is not None]
    complete = len(known) == len(values)
    return {
        "mean": statistics.fmean(known) if complete else None,
        "sd": statistics.stdev(known) if complete and len(known) > 1 else None,
        "values": list(values),
    }


def curve(runs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> dict[str, Any]:
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
