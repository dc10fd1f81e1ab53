"""The rows of a comparison: what came of the runs of each method, variant and ratio, over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msfusion.experiment.comparison import Planned, role_of
from msfusion.experiment.config import Config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.kinds import kind_of
from msfusion.experiment.report.spreads import curve, spread, spread_to, times_less, until_as_good
from msfusion.experiment.report.table import Row

_FIRST = ("perplexity", "accuracy")
"""By what rows are compared, where they have it: else by their loss."""
_QUALITY = ("accuracy", "loss", "perplexity")


def collect_cells(path: Path, planned: Sequence[Planned]) -> list[dict[str, Any]]:
    """The rows, as plain values (JSON), widest first. Raises RunDirectoryError where a run is not finished."""
    runs: dict[str, list[Planned]] = {}
    for run in planned:
        runs.setdefault(run.cell, []).append(run)
    cells = [_cell(path, each) for each in runs.values()]
    compare_cells(cells, [each[0].config.data.source for each in runs.values()])
    _add_traffic(path, [cell for cell in cells if kind_of(cell["method"]).compresses])
    return sorted(cells, key=lambda cell: -(cell["ratio"] or 0.0))


def compare_cells(cells: Sequence[dict[str, Any]], sources: Sequence[str]) -> None:
    """Say of each row how far it is behind the one that leads. A row with other data says nothing of it."""
    for cell, source in zip(cells, sources, strict=True):
        same_task = [other for other, its in zip(cells, sources, strict=True) if its == source]
        leader = _leader(cell, same_task)
        cell["behind"] = None if leader is None else behind(cell, leader)
        cell["gap_closed"] = gap_closed(cell, same_task)


def _leader(cell: Row, cells: Sequence[Row]) -> Row | None:
    """What a row is compared with: the first row of the same variant and ratio; for that row itself the first
    variant's. None where that is itself once more, or FedAvg stands beside several ratios.
    """
    variant = [other for other in cells if other["variant"] == cell["variant"]]
    if role_of(cell["method"]) == "ceiling":
        variant = [other for other in variant if role_of(other["method"]) != "ceiling"]
        return variant[0] if len({other["ratio"] for other in variant}) == 1 else None
    leader = next(other for other in variant if other["ratio"] == cell["ratio"])
    if leader is cell:
        leader = next(other for other in cells if other["ratio"] == cell["ratio"])
    return None if leader is cell else leader


def behind(cell: Row, leader: Row) -> dict[str, Any]:
    """By how much a row is behind the leader, seed by seed: in perplexity, accuracy (0 to 1), or loss."""
    figure = next(each for each in (*_FIRST, "loss") if each in cell and each in leader)
    ours, theirs = cell[figure]["values"], leader[figure]["values"]
    pairs = zip(theirs, ours, strict=True) if figure == "accuracy" else zip(ours, theirs, strict=True)
    return spread([None if None in (more, less) else more - less for more, less in pairs])


def gap_closed(cell: Row, cells: Sequence[Row]) -> dict[str, Any] | None:
    """How much of the way from the small model to FedAvg of the whole, which no participant can run, a row has come.

    `share` is the mean of (row - small) over the mean of `gap` = (FedAvg - small), paired by seed, in what
    `behind` goes by: 0 is no better than the small model, below 0 worse. It is None where the gap is not more than two
    standard deviations. None where small (of the same ratio) or FedAvg did not run, for as many rounds.
    """
    small, whole = beside(cell, cells, "floor", cell["ratio"]), beside(cell, cells, "ceiling", 1.0)
    if small is None or whole is None or role_of(cell["method"]) is not None:
        return None
    gap, gained = behind(small, whole), behind(small, cell)
    real = None not in (gap["sd"], gained["mean"]) and gap["mean"] > 2 * gap["sd"]
    return {"share": gained["mean"] / gap["mean"] if real else None, "gap": gap}


def beside(cell: Row, cells: Sequence[Row], role: str, ratio: float | None) -> Row | None:
    """The row of a method with this role and ratio, as many rounds long: of the same variant, or the best of any."""
    rows = [
        each
        for each in cells
        if role_of(each["method"]) == role and (each["ratio"], each["rounds"]) == (ratio, cell["rounds"])
    ]
    own = next((each for each in rows if each["variant"] == cell["variant"]), None)
    return own or min(rows, key=lambda each: each["loss"]["mean"] or float("inf"), default=None)


def _add_traffic(path: Path, cells: Sequence[dict[str, Any]]) -> None:
    """What each row of split learning sent until it was as good as the first of them, the baseline."""
    for cell in cells:
        runs = [RunDirectory(path / run["directory"]).read_metrics() for run in cell["runs"]]
        cell["until_baseline"] = until_as_good(runs, cells[0]["accuracy"])
        cell["times_less"] = times_less(cell["until_baseline"], cells[0]["until_baseline"])


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
        "inference_flops_per_example": summary.get("trained_model", {}).get("inference_flops_per_example"),
        "total_bytes": statistics.fmean(_total_bytes(metrics) / len(participants) for _, metrics in results),
        "runs": [
            {
                "seed": run.seed,
                "directory": run.name,
                **{key: summary[key] for key in (*_QUALITY, "seconds") if key in summary},
            }
            for run, (summary, _) in zip(runs, results, strict=True)
        ],
    }
    for key in (*_QUALITY, "accuracy_sd", "own_accuracy", "own_accuracy_sd", "simulated_seconds"):
        if key in summary:
            cell[key] = spread([summary[key] for summary, _ in results])
    if "metrics" in summary:
        cell["metrics"] = {
            name: spread([each["metrics"].get(name) for each, _ in results]) for name in summary["metrics"]
        }
    all_metrics = [metrics for _, metrics in results]
    cell["targets"] = [
        spread_to(all_metrics, accuracy, len(participants)) for accuracy in first.config.evaluation.targets
    ]
    cell["curve"] = curve(all_metrics, next((each for each in _FIRST if each in summary), "loss"))
    return cell


def _total_flops(summary: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]], config: Config) -> float:
    """Training FLOPs of a whole run, a mean over the participants. Who was too late has computed as well."""
    settings, capacities = config.training_settings, config.capacities
    spent = 0.0
    for line in metrics:
        if "training_flops" in line:  # the method's own count, where stages of a run differ
            spent += line["training_flops"]
            continue
        for participant in [*line["participants"], *line.get("late", [])]:
            row = summary["participants"][participant]
            ratio = capacities.ratio(participant, line["round"] - 1)
            costs = next((each for each in row.get("by_ratio", []) if each["ratio"] == ratio), row)
            spent += sum(settings.batch_sizes(row["examples"])) * costs["flops_per_example"]
    return spent / len(summary["participants"])


def _total_bytes(metrics: Iterable[Mapping[str, Any]]) -> float:
    """Bytes that went down and up in a whole run, between all participants and the server."""
    return sum(float(line["bytes_down"] + line["bytes_up"] + line["measuring_bytes"]) for line in metrics)
