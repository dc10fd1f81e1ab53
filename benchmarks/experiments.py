"""Run the experiments of this folder, and write their tables and plots into docs/experiments.md.

An experiment is one file here, NAME.toml, with a [comparison]. Its runs are kept and resumed under
runs/experiments/NAME; what came of them goes to benchmarks/results/NAME.json. What growth.py wrote can stand there too.

    python benchmarks/experiments.py run fashion_mnist ablations
    python benchmarks/experiments.py document              # all of benchmarks/results; --check only compares
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import growth_report

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "experiments.md"
PLOTS = HERE.parent / "docs" / "plots"
PLACE = re.compile(r"(<!-- results: ([a-z0-9_]+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""Where a table goes in the page: everything between the two marks is written by this program."""

Row = Mapping[str, Any]
DIGITS = {"accuracy": (100, 1), "perplexity": (1, 1), "loss": (1, 3)}
"""How a metric is told: times what, and with how many decimals."""


def run(names: list[str], workers: int | None) -> None:
    """Run experiments that are not finished yet, and save their results."""
    from rich.console import Console

    from msfusion.experiment.compare import compare
    from msfusion.experiment.comparison import Comparison
    from msfusion.experiment.config import load_config
    from msfusion.experiment.watch import watcher

    os.chdir(HERE.parent)  # where the files' relative paths start
    for name in names:
        config = load_config(HERE / f"{name}.toml", [f"run.workers={workers}"] if workers else [])
        result = compare(
            config,
            Path("runs/experiments") / name,
            Comparison.of(config),
            resume=True,
            watch=lambda title: watcher(Console(), title),
        )
        for cell in result["cells"]:
            for each in cell["runs"]:
                each.pop("directory")  # of no use to who did not run it
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def document(check: bool) -> bool:
    """Write every table that the page has a place for, and its plot; whether all were as they should be."""
    text = PAGE.read_text()
    written = PLACE.sub(lambda place: f"{place[1]}{section(place[2])}{place[3]}", text)
    if not check:
        from msfusion.experiment.report.plot import save_plot

        PAGE.write_text(written)
        PLOTS.mkdir(exist_ok=True)
        for place in filter(lambda place: has_results(place[2]), PLACE.finditer(written)):
            result, path = results(place[2]), PLOTS / f"{place[2]}.png"
            if "cells" in result:
                save_plot(result, path)
            else:
                growth_report.save_plot(result["runs"], path)
    return written == text


def has_results(name: str) -> bool:
    """Whether an experiment has been run."""
    return (RESULTS / f"{name}.json").is_file()


def results(name: str) -> dict[str, Any]:
    """What an experiment's result file says."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def section(name: str) -> str:
    """An experiment's tables, with where they come from and their picture."""
    if not has_results(name):
        command = f"experiments.py run {name}"
        if name.startswith("growth_"):
            command = f"growth.py --seeds 3 --task {name.removeprefix('growth_')}"
        return f"(Not run yet: `python benchmarks/{command}`.)\n"
    result = results(name)
    if "cells" not in result:
        task, commit = result["settings"]["task"], str(result["environment"].get("commit"))[:9]
        source = f"{len(result['runs'])} seeds, commit {commit}, `benchmarks/growth.py --task {task}`"
        return f"{growth_report.markdown(result['runs'])}\n\n({source}.)\n\n![{name}](plots/{name}.png)\n"
    parts = []
    for title, rows in tables(result).items():
        parts += [f"{title}:\n"] if title else []
        parts += [table(rows), ""]
        if any(row.get("targets") for row in rows):
            parts += [targets_table(rows, len(result["seeds"])), ""]
        if any(row.get("until_baseline") for row in rows):
            parts += [traffic_table(rows, len(result["seeds"])), ""]
    seeds, commit = len(result["seeds"]), str(result["environment"].get("commit"))[:9]
    source = f"{seeds} seed{'s' * (seeds > 1)}, commit {commit}, `benchmarks/{name}.toml`"
    return "\n".join([*parts, f"({source}.)\n", f"![{name}](plots/{name}.png)\n"])


def tables(result: Row) -> dict[str, list[Row]]:
    """The rows of each table under its title: one for each variant that several methods have, and each ratio.

    FedAvg, which holds everything whatever the ratio, stands in each of them.
    """
    cells = result["cells"]
    several = len({(cell["variant"], cell["method"]) for cell in cells}) > len(names_of(cells))
    found: dict[str, list[Row]] = {}
    for cell in cells:
        if cell["method"] == "fedavg" and (several or result["ratios"]):
            continue
        ratio = f"Width ratio {cell['ratio_label']}" if result["ratios"] else ""
        found.setdefault(str(cell["variant"]) if several else ratio, []).append(cell)
    for rows in found.values():
        rows += [
            cell
            for cell in cells
            if cell["method"] == "fedavg"
            and cell not in rows
            and (not several or cell["variant"] == rows[0]["variant"])
        ]
    # what no participant could run is a reference, and stands last
    return {title: sorted(rows, key=lambda row: not row["within_budget"]) for title, rows in found.items()}


def names_of(rows: Sequence[Row]) -> list[str]:
    """What the rows are called: by their variants where these differ, or else by their methods."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    return [str(variant) for variant in variants] if len(variants) > 1 else [row["method"] for row in rows]


def table(rows: list[Row]) -> str:
    """Markdown: a line for each row; what it is behind the first is told seed by seed."""
    leader, by_variant = rows[0], len({row["variant"] for row in rows}) > 1
    language = "perplexity" in leader
    metrics = ["perplexity", "accuracy", "loss"] if language else ["accuracy", "loss"]
    shown = [f"{metric}, %" if metric == "accuracy" else metric for metric in metrics]
    personal = any("accuracy_sd" in row for row in rows)  # everybody has a model of its own
    own = any("own_accuracy" in row for row in rows)  # and was asked what it is worth to itself
    headers = ["variant" if by_variant else "method", *shown, "behind, seed by seed", "FLOPs an example"]
    headers += ["between participants, %", "GFLOPs in all", "MB in all"] if personal else []
    alike = [row for row in rows if row["parameters"] == leader["parameters"] and "until_baseline" not in row]
    small = not personal and any(2 * row["total_bytes"] < leader["total_bytes"] for row in alike)
    unequal = (
        not personal and by_variant and any(2 * row["total_flops"] < leader["total_flops"] for row in rows)
    )
    headers += ["GFLOPs in all"] if unequal else []
    headers += ["kB in all", "times fewer"] if small else []
    headers += ["own labels, %", "between participants, %"] if own else []
    lines = [f"| {' | '.join(headers)} |", "|" + " --- |" * len(headers)]
    for row, name in zip(rows, names_of(rows), strict=True):
        over = "" if row["within_budget"] else " (beyond the budget)"
        values = [spread(row[metric], *DIGITS[metric]) for metric in metrics]
        behind = (
            differences(row, leader, "perplexity" if language else "accuracy") if row is not leader else ""
        )
        flops = f"{row['flops_per_example'] / 1e6:.2f} M"
        more = personal_columns(row) if personal else []
        more += [f"{row['total_flops'] / 1e9:,.0f}"] if unequal else []
        more += bytes_columns(row, leader) if small else []
        more += [spread(row[f"own_accuracy{of}"], 100, 1) for of in ("", "_sd")] if own else []
        lines.append(f"| {' | '.join([name + over, *values, behind, flops, *more])} |")
    return "\n".join(lines)


def personal_columns(row: Row) -> list[str]:
    """The spread between participants, and what one of them computed and sent in the whole run."""
    apart = spread(row["accuracy_sd"], 100, 1) if "accuracy_sd" in row else "-"
    return [apart, f"{row['total_flops'] / 1e9:.0f}", f"{row['total_bytes'] / 1e6:.2f}"]


def bytes_columns(row: Row, leader: Row) -> list[str]:
    """What a participant sent and was sent in the whole run, and how many times less that is than the first row's."""
    return [f"{row['total_bytes'] / 1e3:,.0f}", f"{leader['total_bytes'] / row['total_bytes']:.1f}"]


def targets_table(rows: list[Row], seeds: int) -> str:
    """Markdown: simulated seconds, bytes and rounds until each target accuracy was first reached."""
    lines = ["| method | accuracy | seconds | kB per participant | rounds |", "|" + " --- |" * 5]
    for row, name in zip(rows, names_of(rows), strict=True):
        for target in row["targets"]:
            told = [f"reached in {target['reached']} of {seeds} runs", "", ""]
            if target["reached"] == seeds:
                told = [spread(target["simulated_seconds"], 1, 1), spread(target["bytes"], 1e-3, 0)]
                told.append(spread(target["rounds"], 1, 1))
            lines.append(f"| {name} | {target['accuracy']:.0%} | {' | '.join(told)} |")
    return "\n".join(lines)


def traffic_table(rows: list[Row], seeds: int) -> str:
    """Markdown: what split learning sent until it was as good as the first row, and how many times less that is."""
    headers = ["rounds", "MB up", "MB down", "times less up", "down", "both ways", "everything"]
    until = (
        f"until the baseline less its sd ({100 * rows[0]['until_baseline']['accuracy']:.1f} % in the mean)"
    )
    lines = [f"| {until} | {' | '.join(headers)} |", "|" + " --- |" * (len(headers) + 1)]
    for row, name in zip(rows, names_of(rows), strict=True):
        found, less = row["until_baseline"], row["times_less"]
        told = [f"in {found['reached']} of {seeds} runs", *[""] * (len(headers) - 1)]
        if found["reached"] == seeds:
            spent = [spread(found[f"{kind}_bytes"], 1e-6, 1) for kind in ("activation", "gradient")]
            baseline = rows[0]["until_baseline"]["gradient_bytes"]["mean"]
            down = baseline / found["gradient_bytes"]["mean"] if baseline else None
            ratios = [less["activations"], down, less["both"], less["all"]]
            told = [spread(found["rounds"], 1, 1), *spent]
            told += ["-" if ratio is None else f"{ratio:.1f}" for ratio in ratios]
        lines.append(f"| {name} | {' | '.join(told)} |")
    return "\n".join(lines)


def differences(row: Row, leader: Row, metric: str) -> str:
    """By how much a row is behind the leader in each seed."""
    from msfusion.experiment.report.cells import behind

    return spread(behind(row, leader), *DIGITS[metric], sign="+")


def spread(value: Row, scale: float, digits: int, sign: str = "") -> str:
    """Mean ± standard deviation."""
    if value["mean"] is None:
        return "-"
    mean = f"{scale * value['mean']:{sign}.{digits}f}"
    return mean if value["sd"] is None else f"{mean} ± {scale * value['sd']:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run experiments, or go on with them")
    running.add_argument("names", nargs="+")
    running.add_argument("--workers", type=int, help="instead of run.workers in the file")
    documenting = commands.add_parser("document", help="write the tables and plots of docs/experiments.md")
    documenting.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 if something differs"
    )
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.names, arguments.workers)
    elif not document(arguments.check) and arguments.check:
        sys.exit("docs/experiments.md differs from benchmarks/results: run this without --check")


if __name__ == "__main__":
    main()
