"""Several methods on the same data, participants and rounds, over several seeds, with what each costs.

Every run is a run directory of its own under the comparison's; what is finished is not run again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from msfusion.config import Config
from msfusion.runs.cells import collect_cells
from msfusion.runs.comparison import Comparison, plan_runs
from msfusion.runs.directory import RunDirectory
from msfusion.runs.environment import environment
from msfusion.runs.files import write_json
from msfusion.runs.prepare import shared_parts
from msfusion.runs.setup import Parts
from msfusion.runs.train import Watcher, train


def compare(
    config: Config,
    path: Path,
    comparison: Comparison,
    *,
    resume: bool = False,
    watch: Callable[[str], AbstractContextManager[Watcher]],
) -> dict[str, Any]:
    """Run everything that is compared, and return what `compare.json` in `path` then says.

    `watch` gives for the title of a run who watches it. Raises ConfigError for what cannot be compared,
    RunDirectoryError for a directory that is in use, and whatever a run raises.
    """
    if not resume:
        RunDirectory.check_free(path)
    planned = plan_runs(config, comparison)
    parts: Parts | None = None
    parts_of = ""
    for number, run in enumerate(planned, start=1):
        if not RunDirectory(path / run.name).finished and parts_of != _key(run.config):
            parts, parts_of = shared_parts(run.config), _key(run.config)
        with watch(f"[{number}/{len(planned)}] {run.name}") as watcher:
            train(run.config, path / run.name, resume=True, watcher=watcher, parts=parts)
    result = {
        "environment": environment(),
        "config": config.to_table(),
        **asdict(comparison),
        "seeds": list(range(config.seed, config.seed + comparison.seeds)),
        "cells": collect_cells(path, planned),
    }
    write_json(path / "compare.json", result)
    return result


def _key(config: Config) -> str:
    """Equal for runs that share data, model and width map."""
    return repr((config.data_spec, config.model_spec, config.method.name == "fedgrow"))
