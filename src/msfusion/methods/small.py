"""The floor of every comparison: FedAvg of a small model that all participants can hold.

The small model is the static window of the smallest participant's ratio, trained as a model of its own:
nothing is scaled, everybody gets all of it, and nothing of the large model is left in it but its shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from torch import Tensor, nn

from msfusion.averaging.robust import Average, accumulator_for
from msfusion.batch import Batch
from msfusion.federated.method import Answered, Kind, Method, Task, Update
from msfusion.federated.privacy import Outbound
from msfusion.federated.sharding import Read, Sharding, stretched
from msfusion.federated.states import loaded, state_of, with_aliases, without_aliases
from msfusion.federated.training import TrainingSettings
from msfusion.methods.narrow import Weighting, add_update, train_update, weight_in_mean, with_memory
from msfusion.methods.parts import batch_norm
from msfusion.methods.parts.contrastive import (
    WITHOUT,
    ContrastiveObjective,
    ContrastiveSettings,
    frozen,
    recalled,
)
from msfusion.methods.parts.divided import check_divisible
from msfusion.methods.parts.vectorised import (
    groups_of,
    refuse_contrastive,
    refuse_own_loss,
    refuse_own_training,
    updates_together,
)
from msfusion.objectives import Evaluation, Objective
from msfusion.scoring import CROSS_ENTROPY, Scoring
from msfusion.width.groups import ShardMap, State, WidthMap, Window
from msfusion.width.slices import extract
from msfusion.width.stacked import check_stackable
from msfusion.width.submodel import SubModel, narrow
from msfusion.windows import static


@dataclass(frozen=True, eq=False, repr=False)
class SmallMethod(Method):
    """FedAvg of a small model. `training` has one entry per participant; `width_map` is the small model's.

    The model is working space; the state is what counts.
    """

    name: str
    model: SubModel
    width_map: WidthMap
    start: State
    training: tuple[TrainingSettings, ...]
    recalibrate: bool
    seed: int = 0
    weighting: Weighting = "examples"
    average: Average = "mean"
    scoring: Scoring = CROSS_ENTROPY
    contrastive: ContrastiveSettings = WITHOUT

    trains_own_models: ClassVar[bool] = True

    def initial_state(self) -> dict[str, Tensor]:
        """The weights of a freshly initialised model of this width."""
        return {name: tensor.clone() for name, tensor in self.start.items()}

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """The whole small model."""
        return Task(participant, round_index, without_aliases(state, self.width_map.aliases))

    def train(self, task: Task, data: Batch) -> Update:
        """Some steps on the participant's own examples."""
        loaded(self.model, with_aliases(task.tensors, self.width_map.aliases))
        settings, objective = self.training[task.participant], self._objective(task)
        update = train_update(self.model, task, data, settings, self.seed, self.width_map, objective)
        return with_memory(update) if self.remembers else update

    @property
    def remembers(self) -> bool:
        """What the contrastive loss compares with."""
        return self.contrastive.weight > 0

    def check_together(self) -> None:
        """Raise ConfigError where the participants' models cannot be stacked."""
        refuse_contrastive(self.contrastive)
        refuse_own_loss(self.scoring)
        refuse_own_training(self.training)
        check_stackable(self.model)

    def groups(
        self, round_index: int, participants: Sequence[int], data: Sequence[Batch], limit: int
    ) -> list[tuple[int, ...]]:
        """Everybody has the same model."""
        return groups_of(participants, data, self.training, limit, lambda participant: ())

    def train_together(self, tasks: Sequence[Task], data: Sequence[Batch]) -> list[Update]:
        """What `train` gives for each of a group."""
        return updates_together(self.model, tasks, data, self.training[tasks[0].participant], self.seed)

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        """The small model's tensors, as they came; of a measurement the moments."""
        if kind == "measure":
            return batch_norm.measured_outbound(self.model, task.tensors)
        return super().outbound(kind, task)

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """The weighted average (McMahan et al., AISTATS 2017, algorithm 1), or a robust one."""
        accumulator = accumulator_for(state, self.width_map, self.average)
        for _, update in answered:
            add_update(accumulator, state, {}, update, self.weighting, self.width_map)
        return accumulator.result()

    def evaluate(self, state: State, data: Batch) -> Evaluation:
        """How good the small model is with this state."""
        loaded(self.model, state)
        return self.scoring.evaluate(self.model, data)

    def weight_in_sums(self, examples: int) -> int:
        """As `weighting` says. Raises ConfigError where the average is no mean."""
        return weight_in_mean(examples, self.weighting, self.average)

    @property
    def recalibrates(self) -> bool:
        """Whether BatchNorm's statistics are to be measured anew."""
        return self.recalibrate

    def measurement(self, state: State, round_index: int, participant: int) -> Task:
        """The averaged model, for a forward pass."""
        return self.assign(state, round_index, participant)

    def measure(self, task: Task, data: Batch) -> Update:
        """The moments of the participant's examples in front of every BatchNorm."""
        loaded(self.model, with_aliases(task.tensors, self.width_map.aliases))
        return batch_norm.measured_update(self.model, task, data, self.training[task.participant], self.seed)

    def settle(self, state: State, updates: Iterable[Update]) -> dict[str, Tensor]:
        """The state with the running statistics pooled over the participants."""
        return {**state, **batch_norm.pooled(state, updates)}

    def sharding(self) -> Sharding:
        """Rows of the small model, all of which a participant holds. Raises ConfigError where it cannot be divided."""
        check_divisible(self, SmallMethod, self.average)
        carrier = self.hollow()

        def evaluate(read: Read, notes: State, data: Batch) -> Evaluation:
            return carrier.evaluate(read([*self.start]), data)

        return Sharding(
            first=self.initial_state(),
            width_map=self.width_map,
            on=lambda shard, cut: self.on_shard(shard),
            carrier=carrier,
            evaluate=evaluate,
        )

    def hollow(self) -> SmallMethod:
        """The method without its first weights, which a participant does not need."""
        return replace(self, start={name: stretched(tensor) for name, tensor in self.start.items()})

    def on_shard(self, shard: ShardMap) -> SmallMethod:
        """The method on some rows of the small model."""
        return replace(self, width_map=shard, start={})

    def _objective(self, task: Task) -> Objective:
        """Cross-entropy; with the contrastive loss where the participant remembers a model of its own."""
        if self.contrastive.weight == 0 or not task.memory:
            return self.scoring.objective
        received, previous = self._frozen
        frozen(received, with_aliases(task.tensors, self.width_map.aliases))
        frozen(previous, with_aliases(recalled(task.memory)[0], self.width_map.aliases))
        return ContrastiveObjective(received, previous, self.contrastive, task.round_index)

    @cached_property
    def _frozen(self) -> tuple[nn.Module, nn.Module]:
        """Working space for the contrastive loss: the model as it was received, and as it was before."""
        return deepcopy(self.model), deepcopy(self.model)


def small_method(
    model: nn.Module,
    width_map: WidthMap,
    ratio: float,
    training: tuple[TrainingSettings, ...],
    seed: int = 0,
    weighting: Weighting = "examples",
    scoring: Scoring = CROSS_ENTROPY,
    contrastive: ContrastiveSettings = WITHOUT,
    recalibrate: bool = True,
    average: Average = "mean",
) -> SmallMethod:
    """FedAvg of `model` narrowed to one ratio, from weights that suit that width."""
    window = static(width_map, 0, 0, ratio, participants=1, seed=seed)
    start = fresh_weights(model, width_map, window)
    shapes = {name: tuple(tensor.shape) for name, tensor in start.items()}
    return SmallMethod(
        name="small",
        model=narrow(model, width_map, window, scaling=False),
        width_map=WidthMap((), shapes, width_map.parameters, aliases=width_map.aliases),
        start=start,
        training=training,
        recalibrate=recalibrate and batch_norm.has_running_statistics(model),
        seed=seed,
        weighting=weighting,
        average=average,
        scoring=scoring,
        contrastive=contrastive,
    )


def fresh_weights(model: nn.Module, width_map: WidthMap, window: Window) -> dict[str, Tensor]:
    """A window of a model's weights, as those of a model of its own."""
    return reinitialised(extract(state_of(model), width_map, window), width_map)


def reinitialised(sub_state: State, width_map: WidthMap) -> dict[str, Tensor]:
    """Fresh weights of a wide model, cut to a narrow one, with the variance that suits the narrow one.

    Initialisations aim at outputs as large as the inputs, so the variance of a weight that is summed over K
    inputs is in proportion to 1/K (He et al., ICCV 2015, equation 10). A narrow model that sums over w of
    them needs K/w times that: its weights are multiplied by sqrt(K/w). Under a normalisation the factor
    makes no difference to the output; where the wide model was initialised with a fixed variance it keeps
    the outputs as large as the wide model's. Biases are left alone. A tied tensor (an embedding that is
    also the output layer) is scaled in both its places.
    """
    ratios: dict[tuple[str, int], float] = {}
    for name, axis in width_map.contracting:
        ratios[width_map.aliases.get(name, name), axis] = (
            width_map.shapes[name][axis] / sub_state[name].shape[axis]
        )
    factors: dict[str, float] = {}
    for (first, _), ratio in sorted(ratios.items()):
        factors[first] = factors.get(first, 1.0) * math.sqrt(ratio)
    scaled: dict[str, Tensor] = {}
    for name, tensor in sub_state.items():
        factor = factors.get(width_map.aliases.get(name, name), 1.0)
        scaled[name] = tensor * factor if factor != 1.0 else tensor.clone()
    return scaled
