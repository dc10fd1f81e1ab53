"""A run of any method, ready to begin: what training, planning and watching need to know of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from msfusion.data.federated import FederatedData
from msfusion.experiment.config import Config
from msfusion.federated.memory import Memories
from msfusion.federated.participation import Calendar
from msfusion.federated.results import ParticipantResult, RoundResult
from msfusion.width.groups import State


@runtime_checkable
class Observer(Protocol):
    """What a method's lines of metrics say beside what all say. It follows a run from its first round."""

    def again(self, line: Mapping[str, Any]) -> None:
        """A round that was run before this process began."""

    def figures(self, result: RoundResult, before: State) -> dict[str, Any]:
        """Of a round that has ended; `before` is the state in which it began."""


@runtime_checkable
class Prepared(Protocol):
    """Data, model and method of a run, whatever the method."""

    @property
    def config(self) -> Config:
        """The configuration, budgets turned into ratios."""

    @property
    def remarks(self) -> Sequence[str]:
        """Sentences for whoever starts the run: what was decided that the configuration leaves open."""

    @property
    def data(self) -> FederatedData:
        """Each participant's examples and the test set, as the model takes them."""

    @property
    def calendar(self) -> Calendar:
        """Who takes part in each round."""

    @property
    def model_digest(self) -> str:
        """Of what the models compute with which the run is made, as in its fingerprint."""

    def initial_state(self) -> dict[str, Tensor]:
        """The state before the first round."""

    def rounds(
        self,
        state: State,
        memories: Memories,
        first_round: int,
        on_participant: Callable[[ParticipantResult], None],
    ) -> Generator[RoundResult, None, None]:
        """The rounds from `first_round` on."""

    def observer(self) -> Observer:
        """Who adds the method's own figures to the metrics."""

    def figures(self) -> dict[str, Any]:
        """What the run asks of each participant, for the summary: plain values."""

    def plan(self) -> dict[str, Any]:
        """What `msfusion plan` says: plain values."""
