"""Slices whose windows go by the model's weights: the server chooses the units, so they travel with the task.

window_p  <-  schedule(..., state = theta)                        assign, in the server
theta_p   <-  theta restricted to window_p                        sent with the numbers of its units
theta_p   <-  theta_p after some steps on p's own data            train
theta[e]  <-  sum a_p theta_p[e] / sum a_p                        fuse, over the participants that held entry e
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from msfusion.averaging.robust import accumulator_for
from msfusion.batch import Batch
from msfusion.errors import ConfigError
from msfusion.federated.method import Answered, Kind, Task, Update
from msfusion.federated.privacy import Outbound
from msfusion.federated.states import loaded, model_state, with_aliases, without_aliases
from msfusion.methods.narrow import NarrowMethod, add_update, train_update
from msfusion.width.groups import State, Window
from msfusion.width.slices import extract

UNITS = ".units."
"""What the name of a group's units begins with, in a task. No tensor of a model is called so."""


@dataclass(frozen=True, eq=False, repr=False)
class WindowsOfState(NarrowMethod):
    """A narrow method whose windows the server chooses. Its own `schedule` is one of windows of the same sizes."""

    choose: Callable[..., dict[str, Tensor]] = field(kw_only=True)

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """The participant's slice, and the units that it consists of."""
        weights = model_state(state)
        window = self._chosen(weights, round_index, participant)
        slice_ = without_aliases(extract(weights, self.width_map, window), self.width_map.aliases)
        units = {UNITS + name: indices for name, indices in window.items()}
        return Task(participant, round_index, {**slice_, **units})

    def train(self, task: Task, data: Batch) -> Update:
        """Some steps on the participant's own examples, in its sub-model."""
        window, tensors = window_of(task)
        submodel = loaded(self._submodel(window), with_aliases(tensors, self.width_map.aliases))
        plain = replace(task, tensors=tensors)
        return train_update(
            submodel,
            plain,
            data,
            self.training[task.participant],
            self.seed,
            self.width_map,
            self.scoring.objective,
        )

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """Overlap averaging; an entry that nobody held keeps its value."""
        weights = model_state(state)
        accumulator = accumulator_for(weights, self.width_map, self.average)
        for task, update in answered:
            window, _ = window_of(task)
            add_update(accumulator, weights, window, update, self.weighting, self.width_map)
        return {**state, **accumulator.result()}

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        """The sub-model's tensors; the units need not come back."""
        if kind == "measure":
            return super().outbound(kind, task)
        return super().outbound(kind, replace(task, tensors=window_of(task)[1]))

    def window(self, round_index: int, participant: int) -> Any:
        """Nobody knows it before the round."""
        return None

    def check_together(self) -> None:
        """Raise ConfigError: sub-models of units that are chosen in the server are trained one by one."""
        raise ConfigError(
            f"{self.name} with windows that go by the weights trains one by one: set together to 1"
        )

    def groups(
        self, round_index: int, participants: Sequence[int], data: Sequence[Batch], limit: int
    ) -> list[tuple[int, ...]]:
        """Everybody by itself."""
        return [(participant,) for participant in participants]

    def _chosen(self, weights: State, round_index: int, participant: int) -> Window:
        assert self.capacities is not None
        return self.choose(
            self.width_map,
            participant,
            round_index,
            self.capacities.ratio(participant, round_index),
            participants=len(self.ratios),
            seed=self.seed,
            state=weights,
        )


def window_of(task: Task) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The window that a task says, and its other tensors."""
    units = {name: tensor for name, tensor in task.tensors.items() if name.startswith(UNITS)}
    window = {name.removeprefix(UNITS): tensor.cpu() for name, tensor in units.items()}
    return window, {n: tensor for n, tensor in task.tensors.items() if not n.startswith(UNITS)}
