"""What the runs of all methods have in common whose rounds are run by `federated.rounds`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from torch import Tensor

from msfusion.data.federated import FederatedData
from msfusion.engines.machine import on_this_machine
from msfusion.experiment.config import Config
from msfusion.experiment.config.sections import SHARDED
from msfusion.federated.engine import engine_named
from msfusion.federated.memory import Memories
from msfusion.federated.method import Method
from msfusion.federated.participation import Calendar, Conditions, RoundSettings
from msfusion.federated.results import ParticipantResult, RoundResult
from msfusion.federated.rounds import run_rounds
from msfusion.width.groups import State


class LocalRun:
    """A part of what `Prepared` asks for. Raises ConfigError where the method cannot be run as configured."""

    def __init__(
        self,
        config: Config,
        data: FederatedData,
        method: Method,
        round_settings: RoundSettings,
        conditions: Conditions,
    ) -> None:
        self.config, self.data, self.method = config, data, method
        self.round_settings, self.conditions = round_settings, conditions
        if config.run.together > 1:
            method.check_together()
        run = config.run
        self.engine = (
            on_this_machine(run.workers, run.threads, run.device)
            if run.engine in (None, SHARDED)  # which `experiment.sharded` makes, with what the ranks have
            else engine_named(str(run.engine))
        )

    @property
    def remarks(self) -> Sequence[str]:
        """Nothing but what the configuration says."""
        return ()

    @property
    def calendar(self) -> Calendar:
        """Who takes part in each round."""
        return Calendar(self.round_settings, self.config.participants.count, self.conditions)

    def initial_state(self) -> dict[str, Tensor]:
        """What there is in common before the first round."""
        return self.method.initial_state()

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
            self.method,
            self.data.participants,
            self.round_settings,
            state=state,
            memories=memories,
            first_round=first_round,
            engine=self.engine,
            threads=settings.threads,
            together=settings.together,
            test=self.data.test,
            conditions=self.conditions,
            screening=self.config.screening,
            on_participant=on_participant,
        )
