"""A run of a method whose participants train sub-models (MSfusion and its rivals), or a small model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

from torch import Tensor

from msfusion.config import Config
from msfusion.data.federated import FederatedData
from msfusion.engines.calendar import Calendar
from msfusion.engines.local import run_rounds
from msfusion.engines.results import ParticipantResult, RoundResult
from msfusion.engines.workers import check_execution
from msfusion.methods.memory import Memories
from msfusion.methods.small import SmallMethod
from msfusion.runs.figures import Reached, run_figures
from msfusion.runs.plan import plan_run
from msfusion.runs.setup import Setup
from msfusion.runs.simulated import arrivals
from msfusion.width.groups import State


class SlicesRun:
    """What `Prepared` asks for. Raises ConfigError where the method cannot be run as the configuration says."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        settings = setup.config.run
        check_execution(setup.method, settings.workers, settings.together, settings.device)

    @property
    def config(self) -> Config:
        """The configuration, budgets turned into ratios."""
        return self.setup.config

    @property
    def data(self) -> FederatedData:
        """Each participant's examples and the test set."""
        return self.setup.data

    @property
    def calendar(self) -> Calendar:
        """Who takes part in each round."""
        return self.setup.calendar

    def initial_state(self) -> dict[str, Tensor]:
        """The state before the first round."""
        return self.setup.method.initial_state()

    def rounds(
        self,
        state: State,
        memories: Memories,
        first_round: int,
        on_participant: Callable[[ParticipantResult], None],
    ) -> Generator[RoundResult, None, None]:
        """The rounds from `first_round` on."""
        settings = self.config.run
        return run_rounds(
            self.setup.method,
            self.data.participants,
            self.setup.rounds,
            state=state,
            memories=memories,
            first_round=first_round,
            workers=settings.workers,
            threads=settings.threads,
            together=settings.together,
            device=settings.device,
            test=self.data.test,
            conditions=self.setup.conditions,
            on_participant=on_participant,
        )

    def observer(self) -> _Observer:
        """Entry coverage and overlap."""
        return _Observer(self.setup)

    def figures(self) -> dict[str, Any]:
        """Parameters, FLOPs, memory and bytes of each participant and of the full model."""
        return run_figures(self.setup)

    def plan(self) -> dict[str, Any]:
        """What `plan_run` says."""
        return plan_run(self.setup)


class _Observer:
    """Entry coverage as the run goes on (not of `small`, which trains no full model), and the overlap."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._reached = None if isinstance(setup.method, SmallMethod) else Reached(setup)

    def again(self, line: Mapping[str, Any]) -> None:
        """A round that was run before."""
        if self._reached is not None:
            self._reached.after(line["round"] - 1, line["participants"], line.get("overlap"), arrivals(line))

    def figures(self, result: RoundResult, before: State) -> dict[str, Any]:
        """Of a round that has ended."""
        figures: dict[str, Any] = {}
        overlap = self._setup.overlap(result.round_index, before)
        if self._reached is not None:
            present = [each.participant for each in result.participants]
            arriving = result.attendance.arriving
            figures["entry_coverage"] = self._reached.after(result.round_index, present, overlap, arriving)
        if overlap is not None:
            figures["overlap"] = overlap
        return figures
