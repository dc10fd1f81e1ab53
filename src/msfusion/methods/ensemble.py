"""The honest rival of every sum: m small models trained one after the other, their probabilities averaged.

Each is trained by FedAvg as `small` is, for a share of the rounds, so that all of them together cost a participant what
one small model costs it. Its learning rate falls over its own rounds: the last model would learn nothing otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.federated.compression import Entries
from msfusion.federated.method import Answered, Kind, Method, Task, Update
from msfusion.federated.privacy import Outbound
from msfusion.federated.sharding import Read, Sharding, itself, without_label
from msfusion.federated.states import labelled, loaded, model_state, part
from msfusion.federated.training import TrainingSettings
from msfusion.methods.blocks import Averages, BlocksSettings, blocks_for, first_weights
from msfusion.methods.parts.contrastive import recalled
from msfusion.methods.parts.divided import check_divisible, evaluated_by_models
from msfusion.methods.parts.phases import Phases
from msfusion.methods.small import SmallMethod
from msfusion.models.sums import MeanOfModels, label
from msfusion.objectives import Evaluation
from msfusion.width.groups import State, WidthMap

_MERGED = ".merged"
"""In the global state: in how many rounds each model has changed. One that never did is not asked."""


@dataclass(frozen=True, eq=False, repr=False)
class EnsembleMethod(Method):
    """Several small models; `small` is the first of them and how it is trained, `starts` the first weights of all."""

    name: str
    small: SmallMethod
    starts: tuple[State, ...]
    phases: Phases

    trains_own_models: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "scoring", self.small.scoring)

    def initial_state(self) -> dict[str, Tensor]:
        """The first weights of all models."""
        merged = {_MERGED: torch.zeros(len(self.starts), dtype=torch.int64)}
        models = [labelled(label(number), start) for number, start in enumerate(self.starts)]
        return {name: tensor.clone() for each in (*models, merged) for name, tensor in each.items()}

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """The model whose turn it is."""
        own = part(state, label(self.phases.phase(round_index)))
        return self.small.assign(own, round_index, participant)

    def train(self, task: Task, data: Batch) -> Update:
        """As the participants of `small` do."""
        return self._at(task.round_index).train(self._of_this_model(task), data)

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        """As `small` declares."""
        return self.small.outbound(kind, task)

    def entries(self, task: Task) -> dict[str, Entries]:
        """Of the model whose turn it is."""
        own = label(self.phases.phase(task.round_index))
        return {name: Entries(f"{own}.{name}") for name in task.tensors}

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """The weighted average, of each model by itself: what comes late may be of the one before."""
        averages = Averages(state, self.small)
        for _, update in answered:
            averages.add(self.phases.phase(update.round_index), update)
        merged = state[_MERGED].clone()
        merged[averages.changed] += 1
        return {**state, **averages.result(), _MERGED: merged}

    def weight_in_sums(self, examples: int) -> int:
        """As `small`."""
        return self.small.weight_in_sums(examples)

    def evaluate(self, state: State, data: Batch) -> Evaluation:
        """How good the mean of the models that have been trained is; of the first one, if none has."""
        trained = state[_MERGED].nonzero().flatten().tolist() or [0]
        models = MeanOfModels([*self.whole.children()][: len(trained)])
        tensors: dict[str, Tensor] = {}
        for number, model in enumerate(trained):
            tensors |= labelled(label(number), part(model_state(state), label(model)))
        return self.small.scoring.evaluate(loaded(models, tensors), data)

    def sharding(self) -> Sharding:
        """Rows of every model, all alike. Raises ConfigError where they cannot be divided."""
        check_divisible(self, EnsembleMethod, self.small.average)
        small, count = self.small.hollow(), len(self.starts)
        names = [*small.start]

        def evaluate(read: Read, notes: State, data: Batch) -> Evaluation:
            trained = notes[_MERGED].nonzero().flatten().tolist() or [0]
            labels = [label(number) for number in trained]
            return evaluated_by_models(
                small.model, names, labels, MeanOfModels.joined, small.scoring, read, data
            )

        return Sharding(
            first=self.initial_state(),
            width_map=small.width_map,
            on=lambda shard, cut: replace(self, small=self.small.on_shard(shard), starts=({},) * count),
            carrier=replace(self, small=small, starts=({},) * count),
            evaluate=evaluate,
            base=without_label,
            base_of_task=itself,
        )

    def check_together(self) -> None:
        """As `small`."""
        self.small.check_together()

    def groups(
        self, round_index: int, participants: Sequence[int], data: Sequence[Batch], limit: int
    ) -> list[tuple[int, ...]]:
        """Everybody has the same model."""
        return self.small.groups(round_index, participants, data, limit)

    def train_together(self, tasks: Sequence[Task], data: Sequence[Batch]) -> list[Update]:
        """What `train` gives for each of a group."""
        return self._at(tasks[0].round_index).train_together(tasks, data)

    def trained_at(self, ratio: float) -> nn.Module:
        """One small model, whatever the ratio."""
        return self.small.model

    @property
    def remembers(self) -> bool:
        """What `small` does."""
        return self.small.remembers

    @cached_property
    def whole(self) -> MeanOfModels:
        """All models as one: working space, its tensors are to be overwritten."""
        return MeanOfModels([deepcopy(self.small.model) for _ in self.starts])

    def _at(self, round_index: int) -> SmallMethod:
        """`small` with the learning rates of a round."""
        step, length = self.phases.place(round_index)
        return replace(
            self.small, training=tuple(_falling(each, step, length) for each in self.small.training)
        )

    def _of_this_model(self, task: Task) -> Task:
        """The task without a memory of another model, which the contrastive loss must not compare with."""
        if not task.memory:
            return task
        same = self.phases.phase(recalled(task.memory)[1]) == self.phases.phase(task.round_index)
        return task if same else replace(task, memory={})


def _falling(settings: TrainingSettings, step: int, length: int) -> TrainingSettings:
    """The settings of the given round of so many, over which alone the learning rate falls."""
    if settings.learning_rate_schedule == "constant":
        return settings
    rate = replace(settings, rounds=length).learning_rate_in(step)
    return replace(settings, learning_rate=rate, learning_rate_schedule="constant")


def ensemble_method(
    name: str,
    small: SmallMethod,
    model: nn.Module,
    width_map: WidthMap,
    settings: BlocksSettings,
    ratio: float,
) -> EnsembleMethod:
    """As many models of the shape of `small` as there would be blocks, at most one for each round.

    Running statistics (BatchNorm) are averaged with the tensors.
    """
    wanted = blocks_for(settings.blocks, ratio)
    phases = Phases(settings.rounds, min(wanted, settings.rounds), passes=1)
    return EnsembleMethod(
        name, small, tuple(first_weights(small, model, width_map, ratio, phases.blocks)), phases
    )
