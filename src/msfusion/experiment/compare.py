"""Several methods on the same data, participants and rounds, over several seeds, with what each costs.

Every run is a run directory of its own under the comparison's; what is finished is not run again. At the end there is a
page of all runs, report.html (`experiment.page`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from msfusion.errors import ConfigError
from msfusion.experiment.comparison import Comparison, Planned, plan_runs
from msfusion.experiment.config import Config
from msfusion.experiment.config.sections import SHARDED
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.environment import environment
from msfusion.experiment.kinds import kind_of, prepare, shared_parts
from msfusion.experiment.lock import locked
from msfusion.experiment.page.write import leave_report
from msfusion.experiment.report.cells import collect_cells
from msfusion.experiment.setup import Parts
from msfusion.experiment.train import Watcher, train
from msfusion.files import write_json


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
    if config.run.engine == SHARDED:
        raise ConfigError(
            f"run.engine = '{SHARDED}' is for one run at a time (msfusion train): leave it out of a comparison, whose "
            "results are the same"
        )
    if not resume:
        RunDirectory.check_free(path)
    planned = plan_runs(config, comparison)
    last = _LastParts()
    _refuse_small_budgets([run for run in planned if not RunDirectory(path / run.name).finished], last)
    with locked(path):
        _run_all(planned, path, watch, last)
        result = {
            "environment": environment(),
            "config": config.to_table(),
            **asdict(comparison),
            "seeds": list(range(config.seed, config.seed + comparison.seeds)),
            "cells": collect_cells(path, planned),
        }
        write_json(path / "compare.json", result)
        leave_report(path)
    return result


@dataclass
class _LastParts:
    """Data, model and width map of the run that was prepared last: the next one mostly has the same."""

    parts: Parts | None = None
    _key: str = ""

    def of(self, config: Config) -> Parts | None:
        """Those of a run, loaded anew only where it has others. Raises MsfusionError."""
        if self._key != _key(config):
            self.parts, self._key = shared_parts(config), _key(config)
        return self.parts


def _refuse_small_budgets(planned: Sequence[Planned], last: _LastParts) -> None:
    """Raise ConfigError where a method needs more than somebody's budget, before any run has begun.

    What is enough for one can be too little for another. Ratios hardly depend on the seed: the first stands for all.
    """
    for run in planned:
        if run.config.participants.budget is not None and run.seed == planned[0].seed:
            prepare(run.config, last.of(run.config))


def _run_all(
    planned: Sequence[Planned],
    path: Path,
    watch: Callable[[str], AbstractContextManager[Watcher]],
    last: _LastParts,
) -> None:
    trained_on: dict[str, tuple[Path, Mapping[str, str]]] = {}
    for number, run in enumerate(planned, start=1):
        here, key = path / run.name, _key(run.config)
        if not RunDirectory(here).finished:
            last.of(run.config)
        with watch(f"[{number}/{len(planned)}] {run.name}") as watcher:
            train(run.config, here, resume=True, watcher=watcher, parts=last.parts, report=False)
        began = RunDirectory(here).read_fingerprint()
        other, data = trained_on.setdefault(key, (here, began.data))  # runs may have been finished long ago
        began.refuse_other_data(data, run.config, f"{here}, compared with {other},")


def _key(config: Config) -> str:
    """Equal for runs that share data, model and width map."""
    return repr((config.data_spec, config.model_spec, kind_of(config.method.name).shares_parts))
