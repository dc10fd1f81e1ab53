"""What a method is to an engine: functions over named tensors. An engine moves them and knows no method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NewType, Protocol, runtime_checkable

from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.federated.privacy import Outbound
from msfusion.objectives import Evaluation
from msfusion.width.groups import State

Scalar = float | int | str | bool

ABSURD = 2.0**64
"""No honest value is as large (about 1.8e19): its square is more than a float32 can hold."""

Kind = Literal["train", "measure", "report"]
"""What a participant does with a task."""

__all__ = [
    "Deferring", "Evaluation", "Kind", "Method", "OwnModels", "Recalibrating", "Released", "Reporting", "Scalar",
    "Task", "TrainsTogether", "Update",
]  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What a participant receives in a round: tensors by name, and small metadata (JSON scalars).

    `memory` is what the participant itself kept after its previous round, on its own machine: it does not
    travel, so it is no traffic. An engine hands it back; `assign` leaves it empty.
    """

    participant: int
    round_index: int
    tensors: State
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    memory: State = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """What a participant sends back: tensors by name, the examples it has, its mean loss, and metadata.

    `memory` is what it keeps on its own machine for its next round, in place of what it kept before (empty:
    nothing new). An engine takes it out before `aggregate` sees the update.

    `share` is how much of the update counts, above 0 and at most 1. An engine sets it below 1 for an update
    of an earlier round that came late; for the rest the global state's present values stand in.
    """

    participant: int
    round_index: int
    tensors: State
    examples: int
    loss: float
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    memory: State = field(default_factory=dict)
    share: float = 1.0


Released = NewType("Released", Update)
"""An update whose tensors are `Shared`: the method's declaration has let it pass, and it may be sent."""


@runtime_checkable
class Method(Protocol):
    """A federated method. Stateless: all that changes from round to round is in the global state, or in what
    each participant keeps for itself.
    """

    @property
    def name(self) -> str:
        """The name in configurations and tables."""

    def initial_state(self) -> dict[str, Tensor]:
        """The global state before round 0."""

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """What the participant receives in this round (in the server)."""

    def train(self, task: Task, data: Batch) -> Update:
        """What the participant does with it (in the participant's process; deterministic given the task)."""

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        """What may leave the participant that did a task (in its process): an engine refuses anything else."""

    def aggregate(self, state: State, updates: Iterable[Update]) -> dict[str, Tensor]:
        """The next global state, whatever the order of the updates. Raises UpdateError on a bad update."""

    def evaluate(self, state: State, data: Batch) -> Evaluation:
        """How good the global state's model is."""


@runtime_checkable
class Recalibrating(Protocol):
    """A method whose model has running statistics that fusion cannot know: they are measured anew.

    The participants of the round measure the fused model on some of their examples, forward only; what
    travels up is moments, summed over examples. An engine asks for this exchange wherever it evaluates.
    """

    @property
    def recalibrates(self) -> bool:
        """Whether there is anything to measure."""

    def measurement(self, state: State, round_index: int, participant: int) -> Task:
        """What the participant receives in order to measure (in the server)."""

    def measure(self, task: Task, data: Batch) -> Update:
        """The moments of the participant's examples (in the participant's process)."""

    def settle(self, state: State, updates: Iterable[Update]) -> dict[str, Tensor]:
        """The global state with the pooled statistics, whatever the order of the updates."""


@runtime_checkable
class Deferring(Protocol):
    """A method to which it matters what a late update changed, since the state is another when it arrives."""

    def deferred(self, update: Update, sent: State) -> Update:
        """The late update as `aggregate` takes it later, given the tensors that it answers (in the server)."""


@runtime_checkable
class Reporting(Protocol):
    """A method whose participants may end up with models of their own, that only they can evaluate.

    An engine then asks everybody for a report wherever it evaluates: what travels up is scores.
    """

    def asks(self, state: State) -> bool:
        """Whether, with this global state, it is the participants who say how good the model is, or theirs are."""

    def examination(self, state: State, round_index: int, participant: int) -> Task:
        """What the participant receives in order to evaluate its model (in the server)."""

    def report(self, task: Task, data: Batch, test: Batch) -> Update:
        """How good its model is on the common test data, and perhaps in its own proportions of labels (in its process).

        Made with `reporting.report_of`; without metadata if it has no model yet.
        """


@runtime_checkable
class OwnModels(Protocol):
    """A method whose participants train small models, one or several, that are not windows of one large model."""

    def trained_at(self, ratio: float) -> nn.Module:
        """What a participant of this width ratio trains, or a module of the same shapes."""

    @property
    def whole(self) -> nn.Module:
        """What they have trained in the end, as one model; its tensors are to be overwritten."""


@runtime_checkable
class TrainsTogether(Protocol):
    """A method that can train several participants at once, with the results of one after the other but for
    rounding.
    """

    def check_together(self) -> None:
        """Raise ConfigError, saying why, where the results would be others."""

    def groups(
        self, round_index: int, participants: Sequence[int], data: Sequence[Batch], limit: int
    ) -> list[tuple[int, ...]]:
        """Who of a round is trained at once, at most `limit` in a group; everybody is in one (in the server).

        `data` has one Batch per participant of the whole federation. The same for the same arguments.
        """

    def train_together(self, tasks: Sequence[Task], data: Sequence[Batch]) -> list[Update]:
        """What the participants of one group do with their tasks, in that order; `data` has one for each task."""
