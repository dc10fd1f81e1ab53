"""The rows of a comparison: what came of the runs of each method, variant and ratio, over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msfusion.config import Config
from msfusion.runs.comparison import Comparison, Planned
from msfusion.runs.directory import RunDirectory


def collect_cells(path: Path, planned: Sequence[Planned], comparison: Comparison) -> list[dict[str, Any]]:
    """The rows, as plain values (JSON). Raises RunDirectoryError where a run is not finished."""
    runs: dict[str, list[Planned]] = {}
    for run in planned:
        runs.setdefault(run.cell, []).append(run)
    variants = list(comparison.variants)

    def position(runs: Sequence[Planned]) -> tuple[float, int, int]:
        variant = variants.index(runs[0].variant) if runs[0].variant else 0
        return -(runs[0].ratio or 0.0), variant, comparison.methods.index(runs[0].method)

    cells = [_cell(path, each) for each in sorted(runs.values(), key=position)]
    for cell in cells:
        leader = _leader(cell, cells, comparison)
        cell["behind"] = None if leader is None else behind(cell, leader)
    return cells


def _leader(
    cell: Mapping[str, Any], cells: Sequence[Mapping[str, Any]], comparison: Comparison
) -> Mapping[str, Any] | None:
    """What a row is compared with: the first method under the same variant and ratio; for the first method
    itself the first variant. None where that is the row itself, or is not one row (FedAvg beside several ratios).
    """
    first, variants = comparison.methods[0], list(comparison.variants)
    if cell["method"] != first:
        wanted = [
            other for other in cells if other["method"] == first and other["variant"] == cell["variant"]
        ]
        if cell["method"] != "fedavg":
            wanted = [other for other in wanted if other["ratio"] == cell["ratio"]]
        return wanted[0] if len(wanted) == 1 else None
    if not variants or cell["variant"] == variants[0]:
        return None
    return next(
        other
        for other in cells
        if (other["method"], other["variant"], other["ratio"]) == (first, variants[0], cell["ratio"])
    )


def behind(cell: Mapping[str, Any], leader: Mapping[str, Any]) -> dict[str, Any]:
    """By how much a row is behind the leader, seed by seed: in accuracy (0 to 1), or in perplexity."""
    if "perplexity" in cell:
        pairs = zip(cell["perplexity"]["values"], leader["perplexity"]["values"], strict=True)
    else:
        pairs = zip(leader["accuracy"]["values"], cell["accuracy"]["values"], strict=True)
    return spread([None if None in (more, less) else more - less for more, less in pairs])


def _cell(path: Path, runs: Sequence[Planned]) -> dict[str, Any]:
    """One row of the table: a method under a variant at a ratio, over the seeds."""
    results = []
    for run in runs:
        directory = RunDirectory(path / run.name)
        results.append((directory.read_summary(), directory.read_metrics()))
    summary = results[0][0]
    participants = summary["participants"]
    first = runs[0]
    cell: dict[str, Any] = {
        "method": first.method,
        "variant": first.variant,
        "ratio": first.ratio,
        "ratio_label": first.ratio_label,
        "rounds": first.config.rounds,
        "within_budget": first.within_budget,
        "entry_coverage": summary["entry_coverage"],
        "parameters": statistics.fmean(each["parameters"] for each in participants),
        "share": statistics.fmean(each["share"] for each in participants),
        "flops_per_example": statistics.fmean(each["flops_per_example"] for each in participants),
        "total_flops": statistics.fmean(
            _total_flops(summary, metrics, run.config)
            for run, (summary, metrics) in zip(runs, results, strict=True)
        ),
        "total_bytes": statistics.fmean(_total_bytes(metrics) / len(participants) for _, metrics in results),
        "runs": [
            {"seed": run.seed, "directory": run.name, **_quality(summary), "seconds": summary["seconds"]}
            for run, (summary, _) in zip(runs, results, strict=True)
        ],
    }
    for key in ("accuracy", "loss", "perplexity"):
        if key in summary:
            cell[key] = spread([summary[key] for summary, _ in results])
    cell["curve"] = curve(
        [metrics for _, metrics in results], "perplexity" if "perplexity" in summary else "accuracy"
    )
    return cell


def spread(values: Sequence[float | None]) -> dict[str, Any]:
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


def _quality(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: summary[key] for key in ("accuracy", "loss", "perplexity") if key in summary}


def _total_flops(summary: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]], config: Config) -> float:
    """Training FLOPs of a whole run, a mean over the participants."""
    settings = config.training_settings
    spent = 0.0
    for line in metrics:
        for participant in line["participants"]:
            costs = summary["participants"][participant]
            examples = costs["examples"] * settings.local_epochs
            if settings.max_steps is not None:
                examples = min(examples, settings.max_steps * settings.batch_size)
            spent += examples * costs["flops_per_example"]
    return spent / len(summary["participants"])


def _total_bytes(metrics: Iterable[Mapping[str, Any]]) -> float:
    """Bytes that went down and up in a whole run, between all participants and the server."""
    return sum(float(line["bytes_down"] + line["bytes_up"] + line["measuring_bytes"]) for line in metrics)
