"""Run the experiments of this folder, and write their tables and plots into docs/experiments.md.

An experiment is one file here, NAME.toml, with a [comparison]. Its runs are kept and resumed under
runs/experiments/NAME; what came of them goes to benchmarks/results/NAME.json.

    python benchmarks/experiments.py run fashion_mnist ablations
    python benchmarks/experiments.py document              # all of benchmarks/results; --check only compares
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAGE = HERE.parent / "docs" / "experiments.md"
PLOTS = HERE.parent / "docs" / "plots"
PLACE = re.compile(r"(<!-- results: ([a-z0-9_]+) -->\n).*?(<!-- end -->)", re.DOTALL)
"""Where a table goes in the page: everything between the two marks is written by this program."""

Row = Mapping[str, Any]


def run(names: list[str], workers: int) -> None:
    """Run experiments that are not finished yet, and save their results."""
    from rich.console import Console

    from msfusion.config import load_config
    from msfusion.runs.compare import compare
    from msfusion.runs.comparison import Comparison
    from msfusion.runs.watch import watcher

    os.chdir(HERE.parent)  # where the files' relative paths start
    for name in names:
        config = load_config(HERE / f"{name}.toml", [f"run.workers={workers}"])
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
        from msfusion.runs.plot import save_plot

        PAGE.write_text(written)
        PLOTS.mkdir(exist_ok=True)
        for place in PLACE.finditer(written):
            save_plot(results(place[2]), PLOTS / f"{place[2]}.png")
    return written == text


def results(name: str) -> dict[str, Any]:
    """What an experiment's result file says."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def section(name: str) -> str:
    """An experiment's tables, one for each ratio (and variant, of several methods), with its picture."""
    result = results(name)
    cells, methods = result["cells"], result["methods"]
    several = len(methods) > 1 and bool(result["variants"])
    tables: dict[str, list[Row]] = {}
    for cell in cells:
        if cell["method"] == "fedavg" and len(methods) > 1:
            continue
        title = f"Width ratio {cell['ratio_label']}"
        tables.setdefault(
            f"{cell['variant']}, {title[0].lower()}{title[1:]}" if several else title, []
        ).append(cell)
    parts = []
    for title, rows in tables.items():
        whole = [cell for cell in cells if cell["method"] == "fedavg" and cell not in rows]
        if several:
            whole = [cell for cell in whole if cell["variant"] == rows[0]["variant"]]
        parts += [f"{title}:\n", table([*rows, *whole], rows[0]), ""]
    seeds, commit = len(result["seeds"]), str(result["environment"]["commit"])[:9]
    source = f"{seeds} seed{'s' * (seeds > 1)}, commit {commit}, `benchmarks/{name}.toml`"
    return "\n".join([*parts, f"({source}.)\n", f"![{name}](plots/{name}.png)\n"])


def table(rows: list[Row], leader: Row) -> str:
    """Markdown: a line for each row; what it is behind is told seed by seed."""
    language = "perplexity" in leader
    by_variant = len({row["method"] for row in rows}) == 1 and leader["variant"] is not None
    metrics = ["perplexity", "accuracy", "loss"] if language else ["accuracy", "loss"]
    headers = ["variant" if by_variant else "method", *metrics, "behind, seed by seed", "FLOPs an example"]
    lines = [f"| {' | '.join(headers)} |", "|" + " --- |" * len(headers)]
    for row in rows:
        name = (
            row["variant"]
            if by_variant
            else row["method"] + ("" if row["within_budget"] else " (beyond the budget)")
        )
        values = [spread(row[metric], 100 if metric == "accuracy" else 1) for metric in metrics]
        difference = (
            differences(row, leader, "perplexity" if language else "accuracy") if row is not leader else ""
        )
        lines.append(
            f"| {name} | {' | '.join(values)} | {difference} | {row['flops_per_example'] / 1e6:.2f} M |"
        )
    return "\n".join(lines)


def spread(value: Row, scale: float) -> str:
    """Mean ± standard deviation; accuracies in per cent."""
    if value["mean"] is None:
        return "-"
    digits, unit = (1, " %") if scale == 100 else (3, "")
    mean = f"{scale * value['mean']:.{digits}f}"
    return f"{mean}{unit}" if value["sd"] is None else f"{mean} ± {scale * value['sd']:.{digits}f}{unit}"


def differences(row: Row, leader: Row, metric: str) -> str:
    """By how much a row is behind the leader in each seed: mean ± standard deviation."""
    from msfusion.runs.cells import behind

    value = behind(row, leader)
    scale, digits = (100, 1) if metric == "accuracy" else (1, 2)
    if value["mean"] is None:
        return "-"
    mean = f"{scale * value['mean']:+.{digits}f}"
    return mean if value["sd"] is None else f"{mean} ± {scale * value['sd']:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run experiments, or go on with them")
    running.add_argument("names", nargs="+")
    running.add_argument("--workers", type=int, default=2)
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
