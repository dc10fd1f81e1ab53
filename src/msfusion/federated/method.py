"""What a method is: functions over named tensors. An engine moves them and knows no method; a method knows no engine.

    state  <-  initial_state()
    for each round t:
        for each participant p of the round:
            task_p    <-  assign(state, t, p)                  in the server
            update_p  <-  train(task_p, p's own data)          where the participant is
        state  <-  fuse(state, all (task_p, update_p))         in the server

Only `assign`, `train` and `fuse` must be written; everything else has a default that fits most methods. A `train` that
asks the server as it goes on is a generator (`federated.conversation`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, NewType

import torch
from torch import Tensor, nn

from msfusion.averaging.fusion import Accumulator
from msfusion.batch import Batch
from msfusion.errors import ConfigError, UpdateError
from msfusion.federated.conversation import Conversation, Request, Response, Scalar
from msfusion.federated.privacy import Outbound
from msfusion.federated.problem import Problem, Settings
from msfusion.federated.sharding import Sharding
from msfusion.federated.states import holding, loaded, model_state, state_of
from msfusion.federated.training import Trained, local_steps
from msfusion.objectives import Evaluation, Objective
from msfusion.scoring import CROSS_ENTROPY, Scoring
from msfusion.width.groups import State, WidthMap, Window

if TYPE_CHECKING:
    from msfusion.federated.accounting import Noise
    from msfusion.federated.compression import Compression, Entries
    from msfusion.federated.secure_sums import SecureSums

ABSURD = 2.0**64
"""No honest value is as large (about 1.8e19): its square is more than a float32 can hold."""

Kind = Literal["train", "measure", "report"]
"""What a participant does with a task."""

TRAINED = frozenset({"steps", "examples_seen"})
"""The numbers that an update's metadata may have with any method: what the participant did in the round."""

__all__ = [
    "TRAINED",
    "Answered",
    "Evaluation",
    "Kind",
    "Method",
    "Released",
    "Scalar",
    "Task",
    "Training",
    "Update",
]


@dataclass(frozen=True)
class Task:
    """What a participant receives in a round: tensors by name, and small metadata (JSON scalars).

    `memory` is what the participant itself kept after its previous round, on its own machine: it does not
    travel, so it is no traffic. The rounds hand it back; `assign` leaves it empty.
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
    nothing new). It is taken out before `fuse` sees the update.

    `share` is how much of the update counts, above 0 and at most 1. The rounds set it below 1 for an update
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


def trained_update(task: Task, data: Batch, done: Trained, tensors: State) -> Update:
    """The update of a participant that has trained on its examples; `tensors` are what it sends back."""
    did = {"steps": done.steps, "examples_seen": done.examples_seen}
    return Update(task.participant, task.round_index, tensors, len(data), done.loss, did)


Training = Generator[Request, Response, Update]
"""The training of a participant that converses with the server: requests out, responses in, an update at the end."""

Released = NewType("Released", Update)
"""An update whose tensors are `Shared`: the method's declaration has let it pass, and it may be sent."""

Answered = Iterable[tuple[Task, Update]]
"""What participants were sent, each with what came back for it; can be gone through once."""


@contextmanager
def blamed(update: Update) -> Iterator[str]:
    """Make an UpdateError that is raised in here name the participant; what it is called is yielded."""
    source = f"participant {update.participant} in round {update.round_index + 1}"
    try:
        yield source
    except UpdateError as error:
        sentence = str(error)
        told = sentence if sentence.startswith(source) else f"{source}: {sentence}"
        raise UpdateError(told, update.participant) from error


class Method(Settings):
    """A federated method. Stateless: all that changes from round to round is in the global state, or in what
    each participant keeps for itself.

    The global state is named tensors. What a method keeps there for itself, such as a momentum, has a name that begins
    with a dot (`.momentum.layers.0.weight`): no tensor of a model is called so. Such a tensor is checkpointed, never
    sent unless `assign` sends it, and never exported.
    """

    name: str
    """The name in tables and error messages. `method` gives it, or the class says it itself."""

    model: nn.Module
    """The whole model. Its weights are the initial state; it is never changed for good."""

    holds_everything: ClassVar[bool] = True
    """A method that is written by hand trains the whole model, unless it says otherwise."""

    metrics: ClassVar[frozenset[str]] = frozenset()
    """Names of numbers that participants report in their updates' metadata. Their mean over the participants of a
    round, weighted by examples, stands in the metrics of that round. So do numbers of these names that the server tells
    in `Conversation.figures`.
    """

    problem: Problem
    """What it was built for: the model, its width map, the participants' ratios, how they train."""

    seed: int = 0
    """What random numbers begin at."""

    scoring: Scoring = CROSS_ENTROPY
    """The loss that participants minimise, and the figures of an evaluation."""

    def build(self, problem: Problem) -> Method:
        """The method for a problem: a copy that has it, its model, scoring and seed."""
        made = copy(self)
        made.__dict__.pop("_working", None)  # of another model, if this was built before
        if made.compression is not None:
            object.__setattr__(made, "_compression", replace(made.compression, method=made))
        known = {"problem": problem, "model": problem.model, "scoring": problem.scoring, "seed": problem.seed}
        for name, value in known.items():
            object.__setattr__(made, name, value)  # a dataclass may be frozen
        return made

    @property
    def compression(self) -> Compression | None:
        """How its messages become small, as `federated.compression.compressed` sets it; None: they go as they are."""
        return self.__dict__.get("_compression")

    @property
    def secure_sums(self) -> SecureSums | None:
        """That the server learns sums alone, as `federated.protected.protected` sets it; None: it sees each update."""
        return self.__dict__.get("_secure_sums")

    @property
    def noise(self) -> Noise | None:
        """The noise that participants add to what they send, set in the same place; None: nothing is added."""
        return self.__dict__.get("_noise")

    def __repr__(self) -> str:
        """Without its weights."""
        return f"<{type(self).__name__} {getattr(self, 'name', '')!r}>"

    # What must be written.

    @abstractmethod
    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """What the participant receives in this round (in the server). The same for the same arguments."""

    @abstractmethod
    def train(self, task: Task, data: Batch) -> Update | Training:
        """What the participant does with it (in the participant's process; deterministic given the task).

        As a generator it asks the server: `response = yield Request(...)`, answered by `conversation`. In one process
        several participants go on side by side, so nothing that one of them trains may be another's (`copied`).
        """

    @abstractmethod
    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """The next global state, whatever the order of the answers. Raises UpdateError on a bad update."""

    # What has a default.

    def initial_state(self) -> dict[str, Tensor]:
        """The global state before round 0: the model's own weights."""
        return state_of(self.model)

    def begins_with(self, state: State) -> bool:
        """Whether a state is the one before round 0."""
        first = self.initial_state()
        return state.keys() == first.keys() and all(torch.equal(state[name], first[name]) for name in first)

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        """What may leave the participant that did a task (in its process): tensors as they came, and `metrics`.

        Anything else is refused before it is sent.
        """
        return Outbound.like(task.tensors, TRAINED | self.metrics)

    def conversation(self, state: State, round_index: int) -> Conversation | None:
        """Who answers what participants ask in this round (in the server); None of a method that asks nothing."""
        return None

    def outbound_request(self, task: Task) -> Outbound:
        """What may leave in a request of the participant that does a task (in its process): by default nothing."""
        return Outbound({})

    @property
    def sequential(self) -> bool:
        """Whether the participants of a round come one after the other, each with what the one before has led to.

        Then there is one at a time, in the order of their numbers, and a fuse after each.
        """
        return False

    @property
    def remembers(self) -> bool:
        """Whether a participant may keep something for its next round (`Update.memory`). Over a network an update that
        says so is refused where nobody may; a method that keeps nothing says it here.
        """
        return True

    def evaluate(self, state: State, data: Batch) -> Evaluation:
        """How good the global state's model is."""
        with holding(self.model, model_state(state)) as model:
            return self.scoring.evaluate(model, data)

    # What most methods are made of.

    def working(self, tensors: State) -> nn.Module:
        """A copy of the model that holds these tensors, to be trained: one for each process, overwritten each time."""
        kept: dict[str, nn.Module] = self.__dict__.setdefault("_working", {})
        if "copy" not in kept:
            kept["copy"] = deepcopy(self.model)
        return loaded(kept["copy"], tensors)

    def copied(self, tensors: State) -> nn.Module:
        """The same, made anew: for a participant that converses, beside which others train in the same process."""
        return loaded(deepcopy(self.model), tensors)

    def trained(
        self, model: nn.Module, task: Task, data: Batch, objective: Objective | None = None
    ) -> Update:
        """Train a model on a participant's examples, as the problem says; the update has what it then holds.

        `objective` is what is minimised, from the model and a mini-batch (default: that of `scoring`).
        """
        done = local_steps(
            model,
            data,
            self.problem.training[task.participant],
            seed=self.seed,
            round_index=task.round_index,
            participant=task.participant,
            objective=objective or self.scoring.objective,
        )
        return trained_update(task, data, done, state_of(model))

    def averaged(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """The state with each tensor that came back averaged, weighted by examples: federated averaging, exact and in
        whatever order (McMahan et al., AISTATS 2017, algorithm 1).

        Tensors of the method's own are averaged as well, where updates have them; the others stay. Of an update that
        counts only in part (`Update.share`) the present state has the other part. Raises UpdateError, naming the
        participant, where an update does not fit the state.
        """
        weights = model_state(state)
        sums: Accumulator | None = None
        for _, update in answered:
            if sums is None:
                own = {name for name in update.tensors if name in state}
                weights = {name: tensor for name, tensor in state.items() if name in own or name in weights}
                shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
                sums = Accumulator(weights, WidthMap((), shapes, ()))
            rest = weights if update.share < 1 else None
            with blamed(update) as source:
                sums.add_part(
                    {}, update.tensors, float(update.examples), share=update.share, rest=rest, source=source
                )
        return {**state, **({} if sums is None else sums.result())}

    # A second exchange: a model may have running statistics that fusion cannot know. Then the participants of a round
    # measure the fused model on some of their examples, forward only, wherever it is evaluated.

    @property
    def recalibrates(self) -> bool:
        """Whether there is anything to measure."""
        return False

    def measurement(self, state: State, round_index: int, participant: int) -> Task:
        """What the participant receives in order to measure (in the server)."""
        raise NotImplementedError(f"{self.name} measures nothing")

    def measure(self, task: Task, data: Batch) -> Update:
        """The moments of the participant's examples (in the participant's process)."""
        raise NotImplementedError(f"{self.name} measures nothing")

    def settle(self, state: State, updates: Iterable[Update]) -> dict[str, Tensor]:
        """The global state with the pooled statistics, whatever the order of the updates."""
        raise NotImplementedError(f"{self.name} measures nothing")

    # Models of one's own: where only participants can say how good their models are, everybody is asked for a report
    # wherever the model is evaluated. What travels up is scores.

    def asks(self, state: State) -> bool:
        """Whether, with this global state, it is the participants who say how good the model is, or theirs are."""
        return False

    def examination(self, state: State, round_index: int, participant: int) -> Task:
        """What the participant receives in order to evaluate its model (in the server)."""
        return self.assign(state, round_index, participant)

    def report(self, task: Task, data: Batch, test: Batch) -> Update:
        """How good its model is on the common test data, and perhaps in its own proportions of labels (in its process).

        Made with `reporting.report_of`; without metadata if it has no model yet.
        """
        raise NotImplementedError(f"{self.name} asks nobody for a report")

    # Several at once: a method may train the participants of a group in one go, with the results of one after the
    # other but for rounding.

    def check_together(self) -> None:
        """Raise ConfigError, saying why, where participants cannot be trained at once."""
        raise ConfigError(f"{self.name} cannot train several participants at once: set together to 1")

    def groups(
        self, round_index: int, participants: Sequence[int], data: Sequence[Batch], limit: int
    ) -> list[tuple[int, ...]]:
        """Who of a round is trained at once, at most `limit` in a group; everybody is in one (in the server).

        `data` has one Batch per participant of the whole federation. The same for the same arguments.
        """
        return [(participant,) for participant in participants]

    def train_together(self, tasks: Sequence[Task], data: Sequence[Batch]) -> Sequence[Update | Training]:
        """What the participants of one group do with their tasks, in that order; `data` has one for each task."""
        return [self.train(task, own) for task, own in zip(tasks, data, strict=True)]

    # What participants hold.

    def window(self, round_index: int, participant: int) -> Window | None:
        """The units of the whole model that a participant holds in a round; None of a method without windows."""
        return None

    def with_overlap(self, overlap: float | None) -> Method:
        """The method with the windows of another overlap, where it goes by that (None: its first)."""
        return self

    def overlap(self, round_index: int, state: State | None = None) -> float | None:
        """The share of its window that a participant has in common with its neighbour, where the method sets it.

        Where it depends on the global state, that is the state before the round (None: before the first).
        """
        return None

    # What makes messages small: a participant is sent what is new of what it knows (`federated.compression`).

    def entries(self, task: Task) -> Mapping[str, Entries]:
        """Which entries of the state the tensors of a task have; those that are left out, all of their own name's."""
        return {}

    def known_at_first(self) -> State:
        """What both sides know of the state before a participant has been sent anything. It is left untouched."""
        return self.initial_state()

    # What lets the server do without single updates (`federated.protected`).

    def weight_in_sums(self, examples: int) -> int:
        """The weight of a participant with so many examples, of a method whose `fuse` needs the weighted sum of all
        updates alone. Raises ConfigError, saying why, of one that needs more, and of one that has not said it.
        """
        raise ConfigError(
            f"method.secure and method.privacy do not go with {self.name}, which does not say that the sum of all "
            "updates is enough for it (Method.weight_in_sums): leave them out"
        )

    @property
    def tells_losses(self) -> bool:
        """Whether the loss in an update says something."""
        return True

    def simulated_memory(self, participant: int) -> State:
        """What a participant begins with that is simulated, where one on a machine of its own draws it."""
        return {}

    def first_memory(self) -> State:
        """What a participant on a machine of its own draws before its first task, and keeps as its memory."""
        return {}

    # What is divided among several processes, none of which has all of it.

    def sharding(self) -> Sharding:
        """How the state is divided among ranks (`federated.sharding`). Raises ConfigError where it cannot be."""
        raise ConfigError(
            f"run.engine = 'sharded' does not carry {self.name}, whose state it cannot divide: leave run.engine out"
        )

    # What it costs.

    trains_own_models: ClassVar[bool] = False
    """Whether participants train small models, one or several, rather than windows of one large model."""

    def trained_at(self, ratio: float) -> nn.Module:
        """What a participant of this width ratio trains, or a module of the same shapes: by default the whole model."""
        return self.model

    @property
    def whole(self) -> nn.Module:
        """What has been trained in the end, as one model; its tensors may be overwritten."""
        return self.model
