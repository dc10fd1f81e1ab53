"""Traffic to a baseline's accuracy: what split learning sent until it was as good as without compression."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from msfusion.experiment.report.spreads import spread

Metrics = Sequence[Mapping[str, Any]]
SPENT = ("rounds", "activation_bytes", "gradient_bytes", "all_bytes")


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

    def mean(of: Mapping[str, Any], *keys: str) -> float | None:
        values = [of[key]["mean"] for key in keys]
        return None if None in values else sum(values)

    ratios: dict[str, float | None] = {}
    for name, keys in (
        ("activations", ("activation_bytes",)),
        ("both", ("activation_bytes", "gradient_bytes")),
        ("all", ("all_bytes",)),
    ):
        ours, theirs = mean(row, *keys), mean(baseline, *keys)
        ratios[name] = theirs / ours if ours and theirs else None
    return ratios
