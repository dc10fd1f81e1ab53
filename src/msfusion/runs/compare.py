"""Several methods on the same data, participants and rounds, over several seeds, with what each costs.

Every run is a run directory of its own under the comparison's; what is finished is not run again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from msfusion.config import Config
from msfusion.errors import ConfigError
from msfusion.runs.directory import RunDirectory
from msfusion.runs.environment import environment
from msfusion.runs.figures import mean_flops_per_example
from msfusion.runs.files import write_json
from msfusion.runs.setup import Parts, prepare, prepare_parts
from msfusion.runs.spreads import curve, spread
from msfusion.runs.targets import spread_to
from msfusion.runs.train import Watcher, train
from msfusion.runs.variants import Variant, variants_of

Equal = Literal["rounds", "flops"]


@dataclass(frozen=True)
class Planned:
    """One run of a comparison. `ratio` is None where the configuration's own ratios are meant."""

    variant: Variant
    ratio: float | None
    seed: int
    config: Config

    @property
    def cell(self) -> str:
        """What runs that differ only in their seed share; also the start of their directories' names."""
        name = self.variant.file_name
        if self.ratio is not None:
            name = f"{name}-{self.ratio:g}"
        return f"{name}-rounds{self.config.rounds}"

    @property
    def name(self) -> str:
        """The name of the run's directory."""
        return f"{self.cell}-seed{self.seed}"


def compare(
    config: Config,
    path: Path,
    *,
    methods: Sequence[str],
    seeds: int,
    ratios: Sequence[float] = (),
    equal: Equal = "rounds",
    resume: bool = False,
    watch: Callable[[str], AbstractContextManager[Watcher]],
) -> dict[str, Any]:
    """Run each method with each seed (and width ratio), and return what `compare.json` in `path` then says.

    A method may be followed by settings of its own, as in `msfusion participants.minimum_ratio=1`.
    With `equal` = "rounds" all methods run the configured rounds; with "flops" FedAvg, whose
    participants train the full model, stops when it has spent what a participant of the others spends
    (at least one round).
    `watch` gives for the title of a run who watches it. Raises ConfigError for unknown methods,
    RunDirectoryError for a directory that is in use, and whatever a run raises.
    """
    variants = variants_of(methods)
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds} should be at least 1.")
    if ratios and config.participants.budget is not None:
        raise ConfigError("--ratios and participants.budget exclude each other: leave one of them out.")
    if not resume:
        RunDirectory.check_free(path)
    planned = plan_runs(config, variants, seeds, ratios, equal)
    parts: Parts | None = None
    parts_of = ""
    for number, run in enumerate(planned, start=1):
        if not RunDirectory(path / run.name).finished and parts_of != _key(run.config):
            parts, parts_of = prepare_parts(run.config), _key(run.config)
        with watch(f"[{number}/{len(planned)}] {run.name}") as watcher:
            train(run.config, path / run.name, resume=True, watcher=watcher, parts=parts)
    comparison = collect(config, path, planned, variants, seeds, equal)
    write_json(path / "compare.json", comparison)
    return comparison


def _key(config: Config) -> str:
    """Equal for runs that share data, model and width map."""
    return repr((config.data_spec, config.model_spec))


def plan_runs(
    config: Config, variants: Sequence[Variant], seeds: int, ratios: Sequence[float], equal: Equal
) -> list[Planned]:
    """All runs, seed by seed, so that those with the same data and weights follow each other."""
    fedavg_rounds: dict[float | None, int] = dict.fromkeys(ratios or (None,), config.rounds)
    if equal == "flops" and any(variant.method == "fedavg" for variant in variants):
        fedavg_rounds = {ratio: _rounds_for_equal_flops(config, ratio) for ratio in fedavg_rounds}
    runs: dict[str, Planned] = {}
    for seed in range(config.seed, config.seed + seeds):
        for ratio in ratios or (None,):
            for variant in variants:
                changes: dict[str, Any] = {"seed": seed}
                if ratio is not None:
                    changes["participants.ratio"] = ratio
                fedavg = variant.method == "fedavg"
                if fedavg:  # everybody holds everything, so all ratios share its runs
                    changes |= {"participants.ratio": 1.0, "rounds": fedavg_rounds[ratio]}
                changed = config.changed({**changes, **variant.changes})
                run = Planned(variant, 1.0 if fedavg else ratio, seed, changed)
                runs.setdefault(run.name, run)
    return list(runs.values())


def _rounds_for_equal_flops(config: Config, ratio: float | None) -> int:
    """How many rounds FedAvg can run on what the others spend, at least one."""
    changes: dict[str, Any] = {"method.name": "msfusion"}
    if ratio is not None:
        changes["participants.ratio"] = ratio
    narrow = prepare(config.changed(changes))
    full = prepare(config.changed({"method.name": "fedavg", "participants.ratio": 1.0}))
    share = mean_flops_per_example(narrow) / mean_flops_per_example(full)
    return max(1, math.floor(config.rounds * share))


def collect(
    config: Config,
    path: Path,
    planned: Sequence[Planned],
    variants: Sequence[Variant],
    seeds: int,
    equal: Equal,
) -> dict[str, Any]:
    """What came of all runs, as plain values (JSON). Raises RunDirectoryError where one is not finished."""
    cells: dict[str, list[Planned]] = {}
    for run in planned:
        cells.setdefault(run.cell, []).append(run)
    ordered = sorted(
        cells.values(), key=lambda runs: (-(runs[0].ratio or 0), variants.index(runs[0].variant))
    )
    return {
        "environment": environment(),
        "config": config.to_table(),
        "methods": [variant.label for variant in variants],
        "seeds": list(range(config.seed, config.seed + seeds)),
        "equal": equal,
        "cells": [_cell(path, runs, config) for runs in ordered],
    }


def _cell(path: Path, runs: Sequence[Planned], config: Config) -> dict[str, Any]:
    """One row of the table: a method at a ratio, over the seeds."""
    results = []
    for run in runs:
        directory = RunDirectory(path / run.name)
        results.append((directory.read_summary(), directory.read_metrics()))
    summary = results[0][0]
    participants = summary["participants"]
    first = runs[0]
    cell: dict[str, Any] = {
        "method": first.variant.label,
        "ratio": first.ratio,
        "ratio_label": _ratio_label(first, config),
        "rounds": first.config.rounds,
        "within_budget": first.variant.method != "fedavg" or min(config.participants.ratios) == 1.0,
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
    if "simulated_seconds" in summary:
        cell["simulated_seconds"] = spread([summary["simulated_seconds"] for summary, _ in results])
    all_metrics = [metrics for _, metrics in results]
    cell["targets"] = [
        spread_to(all_metrics, accuracy, len(participants)) for accuracy in config.evaluation.targets
    ]
    cell["curve"] = curve(all_metrics, "perplexity" if "perplexity" in summary else "accuracy")
    return cell


def _quality(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: summary[key] for key in ("accuracy", "loss", "perplexity") if key in summary}


def _ratio_label(run: Planned, config: Config) -> str:
    if run.ratio is not None:
        return f"{run.ratio:g}"
    if config.participants.budget is not None:
        return "budget"
    capacities = run.config.capacities
    ratios = sorted({one for each in range(len(capacities.each)) for one in capacities.possible(each)})
    return f"{ratios[0]:g}" if len(ratios) == 1 else f"{ratios[0]:g}-{ratios[-1]:g}"


def _total_flops(summary: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]], config: Config) -> float:
    """Training FLOPs of a whole run, a mean over the participants. Who was too late has computed as well."""
    settings, capacities = config.training_settings, config.capacities
    spent = 0.0
    for line in metrics:
        for participant in [*line["participants"], *line.get("late", [])]:
            row = summary["participants"][participant]
            ratio = capacities.ratio(participant, line["round"] - 1)
            costs = next((each for each in row.get("by_ratio", []) if each["ratio"] == ratio), row)
            spent += sum(settings.batch_sizes(row["examples"])) * costs["flops_per_example"]
    return spent / len(summary["participants"])


def _total_bytes(metrics: Iterable[Mapping[str, Any]]) -> float:
    """Bytes that went down and up in a whole run, between all participants and the server."""
    return sum(float(line["bytes_down"] + line["bytes_up"] + line["measuring_bytes"]) for line in metrics)
