"""The beginning and the end of the page: how the runs stand, the tables of costs, configuration and environment."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msfusion.experiment.kinds import kind_of
from msfusion.experiment.page.learning import Section
from msfusion.experiment.page.reading import Cell, Run, item, number, read_inside
from msfusion.experiment.report.comparison import comparison_tables
from msfusion.experiment.report.table import Table
from msfusion.experiment.report.usual import results_table
from msfusion.experiment.report.words import duration, quality
from msfusion.quoting import quoted, short


def overview(cells: Sequence[Cell]) -> Section:
    """How each run stands and how good it is, and what of it is damaged or missing."""
    rows = [
        [cell.name, _seed(run), standing(run), _quality(run), _took(run)]
        for cell in cells
        for run in cell.runs
    ]
    table = {"title": "", "columns": ["method", "seed", "rounds", "quality", "time"], "rows": rows}
    problems = [f"{run.name}: {problem}." for cell in cells for run in cell.runs for problem in run.problems]
    # who has which data: a run may be tested on other examples than the next
    described: dict[str, list[str]] = {}
    for cell in cells:
        for run in cell.runs:
            if run.summary and isinstance(told := run.summary.get("data"), str):
                described.setdefault(short(told, 300), []).append(cell.name)
    several = len(described) > 1
    text = " ".join(
        f"Data{f' of {_named(names)}' if several else ''}: {told}." for told, names in described.items()
    )
    return {"id": "overview", "title": "Runs", "text": text, "tables": [table], "problems": problems}


def _named(names: Sequence[str]) -> str:
    return short(", ".join(dict.fromkeys(names)), 100)


def standing(run: Run) -> str:
    """How far a run has come: `finished, 5 rounds`, `3 of 5`."""
    done = len(run.lines)
    if run.summary:
        return f"finished, {done} rounds"
    return f"{done} of {run.planned}" if run.planned is not None else f"{done}"


def _seed(run: Run) -> str:
    return "-" if run.seed is None else str(run.seed)


def _took(run: Run) -> str:
    return duration(math.fsum(each for each in run.series("seconds") if each is not None))


def _quality(run: Run) -> str:
    """That of the last round that was evaluated, in words."""
    line = next((line for line in reversed(run.lines) if "loss" in line), None)
    if line is None:
        return "not evaluated yet"
    metrics = line.get("metrics")
    known = {key: number(line[key]) for key in ("perplexity", "accuracy", "loss") if key in line}
    own = (
        {short(name, 40): number(value) for name, value in metrics.items()}
        if isinstance(metrics, dict)
        else {}
    )
    return quality({**known, "metrics": own})


def costs(cell: Cell) -> Section | None:
    """The tables that the command prints at the end of a run; None where it is not finished."""
    run = next((run for run in cell.runs if run.summary), None)
    if run is None:
        return None
    tables = [told(kind_of(run.method).closing_table(run.summary))]
    if "results" in run.summary:
        tables.append(told(results_table(run.summary)))
    text = "What each participant held, computed and sent, against the full model."
    return {"id": "closing", "title": "Costs at the end", "text": text, "tables": tables}


def comparison(path: Path) -> Section | None:
    """The tables of a comparison; None where there is no compare.json."""
    content = read_inside(path, "compare.json")
    if content is None:
        return None
    tables = [told(table) for table in comparison_tables(json.loads(content))]
    text = "All methods side by side, the mean over the seeds ± one standard deviation."
    return {"id": "comparison", "title": "Comparison", "text": text, "tables": tables}


def told(table: Table) -> dict[str, Any]:
    """A table as plain values (JSON)."""
    headings, rows = table.texts()
    return {"title": table.title, "columns": headings, "rows": rows, "notes": list(table.notes)}


def origin(cell: Cell) -> Section:
    """With what the first run of a cell began: configuration, versions, machine, and what fingerprints say."""
    run = cell.runs[0]
    tables = []
    environment = item(run.about, "environment")
    if isinstance(environment, dict):
        tables.append(_pairs("Versions and machine, when the run began", environment))
    if run.fingerprint:
        tables.append(_pairs("Fingerprint: digests of what decides the results", run.fingerprint))
    text = "Equal fingerprints mean equal results, bit for bit, on the same kind of machine."
    if not isinstance(environment, dict):
        text += " On which machine and with which versions the run began is not noted."
    code = [{"title": "config.toml", "text": run.config_text}] if run.config_text else []
    return {
        "id": "origin",
        "title": "Configuration and environment",
        "text": text,
        "tables": tables,
        "code": code,
    }


def _pairs(title: str, values: dict[str, Any]) -> dict[str, Any]:
    rows = []
    for key, value in list(values.items())[:100]:
        if isinstance(value, dict):
            inside = list(value.items())[:100]
            rows += [[f"{short(key)}, {short(name)}", _word(one)] for name, one in inside]
        else:
            rows.append([short(key), _word(value)])
    return {"title": title, "columns": ["what", "value"], "rows": rows}


def _word(value: object) -> str:
    return short(value, 200) if isinstance(value, str) else quoted(value)
