"""What growth.py measured, as a table, as Markdown and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msfusion.experiment.report.spreads import spread
from msfusion.experiment.report.words import mean_and_sd

Point = Mapping[str, float]
"""step, flops (until then), loss."""
Run = Mapping[str, Any]
"""What one method did with one seed: curve, start_flops, small_flops."""
Runs = Sequence[Mapping[str, Run]]
"""For each seed, the run of each method; "scratch" is one."""


def best(curve: Sequence[Point]) -> Point:
    """The point of a curve at which the loss is lowest."""
    return min(curve, key=lambda point: point["loss"])


def saved(runs: Mapping[str, Run], method: str, with_small: bool = False) -> float | None:
    """The share of scratch's FLOPs that a method did not need (below 0: it needed more); None if it never got there."""
    scratch, ours = best(runs["scratch"]["curve"]), runs[method]
    there = next((point for point in ours["curve"] if point["loss"] <= scratch["loss"]), None)
    if there is None:
        return None
    small = ours["small_flops"] if with_small and method != "scratch" else 0.0
    return 1.0 - (ours["start_flops"] + there["flops"] + small) / float(scratch["flops"])


def rows(runs: Runs) -> list[dict[str, Any]]:
    """For each method, over the seeds: what it saved, and its losses before training and when it was stopped."""
    return [
        {
            "method": method,
            "loss_at_start": [run[method]["curve"][0]["loss"] for run in runs],
            "loss_at_end": [run[method]["curve"][-1]["loss"] for run in runs],
            "saved": [saved(run, method) for run in runs],
            "saved_with_small_model": [saved(run, method, True) for run in runs],
        }
        for method in runs[0]
    ]


def markdown(runs: Runs) -> str:
    """One line for each method, mean ± sd over the seeds."""
    lines = [
        "| | FLOPs saved, % | the small model's counted too, % | loss as it starts |",
        "| --- " * 4 + "|",
    ]
    for row in rows(runs):
        cells = [_spread(row[key], 100, 1) for key in ("saved", "saved_with_small_model")]
        cells = ["-", "-"] if row["method"] == "scratch" else cells
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {_spread(row['loss_at_start'], 1, 3)} |")
    return "\n".join(lines)


def save_plot(runs: Runs, path: Path) -> None:
    """Test loss against training FLOPs, all stages counted; one line for each seed, one colour for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    panel = figure.subplots()
    for colour, method in enumerate(runs[0]):
        for seed, run in enumerate(runs):
            ours = run[method]
            flops = [(ours["start_flops"] + point["flops"]) / 1e12 for point in ours["curve"]]
            losses = [point["loss"] for point in ours["curve"]]
            panel.plot(
                flops, losses, color=f"C{colour}", alpha=0.8, linewidth=1, label="" if seed else method
            )
    lowest = min(best(run["scratch"]["curve"])["loss"] for run in runs)
    start = max(min(each["curve"][0]["loss"] for each in run.values()) for run in runs)
    panel.set_ylim(lowest - 0.2 * (start - lowest), start + 0.6 * (start - lowest))
    panel.set_xlabel("training TFLOPs, the operator's included")
    panel.set_ylabel(f"test loss ({len(runs)} seeds)")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _spread(values: Sequence[float | None], scale: float, digits: int) -> str:
    got = [scale * value for value in values if value is not None]
    if len(got) < len(values):
        return f"got there in {len(got)} of {len(values)} runs"
    return mean_and_sd(f"{{:.{digits}f}}".format)(spread(got))
