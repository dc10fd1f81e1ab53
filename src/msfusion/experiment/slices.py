"""A run of a method whose participants train sub-models (MSfusion and its rivals), or a small model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msfusion.experiment.figures import Reached, run_figures
from msfusion.experiment.fingerprint import model_digest
from msfusion.experiment.local import LocalRun
from msfusion.experiment.plan import plan_run
from msfusion.experiment.prepared import Observer
from msfusion.experiment.setup import Setup
from msfusion.experiment.simulated import arrivals
from msfusion.federated.participation import Calendar
from msfusion.federated.protected import spend, spend_again, spent_by
from msfusion.federated.results import RoundResult
from msfusion.methods.starts import start_line
from msfusion.width.groups import State


class SlicesRun(LocalRun):
    """What `Prepared` asks for. Raises ConfigError where the method cannot be run as the configuration says."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup.config, setup.data, setup.method, setup.rounds, setup.conditions)
        self.setup = setup

    @property
    def remarks(self) -> Sequence[str]:
        """How msfusion starts, where that was left open."""
        why = self.setup.why_start
        return () if why is None else (start_line(why),)

    @property
    def calendar(self) -> Calendar:
        """Who takes part in each round, on the simulated clock if there is one."""
        return self.setup.calendar

    @property
    def model_digest(self) -> str:
        """Of the full model, as it was traced."""
        return model_digest([self.setup.width_map.outline()])

    def observer(self) -> Observer:
        """Entry coverage and overlap."""
        return _Observer(self.setup)

    def figures(self) -> dict[str, Any]:
        """Parameters, FLOPs, memory and bytes of each participant and of the full model."""
        return run_figures(self.setup)

    def plan(self) -> dict[str, Any]:
        """What `plan_run` says."""
        return plan_run(self.setup)


class _Observer:
    """Entry coverage as the run goes on (not of `small`, which trains no full model), the overlap, and what
    differential privacy is spent.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._reached = Reached(setup) if setup.covers else None
        self._spent = spent_by(setup.method)

    def again(self, line: Mapping[str, Any]) -> None:
        """A round that was run before."""
        if self._spent is not None:
            spend_again(self._spent, line)
        if self._reached is not None:
            self._reached.after(line["round"] - 1, line["participants"], line.get("overlap"), arrivals(line))

    def figures(self, result: RoundResult, before: State) -> dict[str, Any]:
        """Of a round that has ended."""
        figures: dict[str, Any] = {}
        overlap = self._setup.method.overlap(result.round_index, before)
        if self._reached is not None:
            present = [each.participant for each in result.participants]
            arriving = result.attendance.arriving
            figures["entry_coverage"] = self._reached.after(result.round_index, present, overlap, arriving)
        if overlap is not None:
            figures["overlap"] = overlap
        if self._spent is not None:
            spend(self._spent, result)
            figures["privacy"] = self._spent.figures()
        return figures
