"""Slices whose windows go by the model's weights: the server chooses the units, so they travel with the task.

A round, for each participant p and entry e of the model:

    window_p  <-  schedule(..., state = theta)                 assign, in the server
    theta_p   <-  theta restricted to window_p                 sent with the numbers of its units
    theta_p   <-  theta_p after some steps on p's own data     train
    theta[e]  <-  sum a_p theta_p[e] / sum a_p                 fuse, over the participants that held entry e
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from msfusion.batch import Batch
from msfusion.errors import ConfigError
from msfusion.federated.method import Kind, Task, Update
from msfusion.federated.privacy import Outbound
from msfusion.federated.states import model_state, without_aliases
from msfusion.methods.narrow import NarrowMethod
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
        return self._trained_in(self.window_of(task), _without_units(task), data)

    def window_of(self, task: Task) -> dict[str, Tensor]:
        """The units that the task says."""
        said = {name: tensor for name, tensor in task.tensors.items() if name.startswith(UNITS)}
        return {name.removeprefix(UNITS): tensor.cpu() for name, tensor in said.items()}

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        """The sub-model's tensors; the units need not come back."""
        if kind == "measure":
            return super().outbound(kind, task)
        return super().outbound(kind, _without_units(task))

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


def _without_units(task: Task) -> Task:
    """The task with the tensors of the sub-model alone."""
    return replace(task, tensors={n: t for n, t in task.tensors.items() if not n.startswith(UNITS)})
