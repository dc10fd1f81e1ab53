"""Narrow sub-models: every participant trains its window of the global model; overlaps are averaged.

MSfusion (Xie & Li, arXiv 2407.03622, algorithm 1) and its rivals differ in nothing but the schedule of
windows:

    for each round t:
        for each participant p of the round:
            theta_p  <-  theta restricted to window(p, t)              assign
            theta_p  <-  theta_p after some steps on p's own data      train (its loss may be contrastive)
        theta[e]     <-  sum a_p theta_p[e] / sum a_p                  fuse
                         over the participants p that held entry e
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from msfusion.averaging.fusion import Accumulator
from msfusion.averaging.robust import Average, accumulator_for
from msfusion.batch import Batch
from msfusion.errors import ConfigError
from msfusion.federated.capacities import Capacities
from msfusion.federated.compression import Entries
from msfusion.federated.method import Answered, Kind, Method, Task, Update, blamed, trained_update
from msfusion.federated.privacy import Outbound
from msfusion.federated.sharding import Read, Sharding
from msfusion.federated.states import holding, loaded, model_state, state_of, with_aliases, without_aliases
from msfusion.federated.training import TrainingSettings, local_steps
from msfusion.methods.parts import batch_norm
from msfusion.methods.parts.contrastive import (
    WITHOUT,
    ContrastiveObjective,
    ContrastiveSettings,
    frozen,
    recalled,
    remembered,
)
from msfusion.methods.parts.divided import check_divisible, evaluated_by_layers
from msfusion.methods.parts.vectorised import (
    groups_of,
    refuse_contrastive,
    refuse_own_loss,
    refuse_own_training,
    updates_together,
)
from msfusion.objectives import Objective, cross_entropy
from msfusion.scoring import CROSS_ENTROPY, Scoring
from msfusion.width.groups import ShardMap, State, WidthMap, Window
from msfusion.width.own_scale import OwnScale
from msfusion.width.slices import extract, plan
from msfusion.width.stacked import check_stackable
from msfusion.width.submodel import SubModel, narrow, program_of
from msfusion.windows import Schedule, full, static

Use = Literal["training", "received", "previous"]
"""What a sub-model in memory is for: the one that trains, and the frozen ones of the contrastive loss."""

Weighting = Literal["examples", "uniform"]
"""The weight a_p of a participant in the average: how many examples it has, or 1."""


@dataclass(frozen=True, eq=False, repr=False)
class NarrowMethod(Method):
    """One of the methods that train narrow sub-models; `schedule` says which.

    `overlaps` says how much neighbours' windows have in common in a round, where the method sets that.

    `ratios` and `training` have one entry per participant; where ratios change from round to round,
    `capacities` says how, and `ratios` are typical ones. The model is a template: its weights are the initial
    state, and it is never changed.
    """

    name: str
    model: nn.Module
    width_map: WidthMap
    schedule: Schedule
    ratios: tuple[float, ...]
    training: tuple[TrainingSettings, ...]
    seed: int = 0
    weighting: Weighting = "examples"
    scoring: Scoring = CROSS_ENTROPY
    contrastive: ContrastiveSettings = WITHOUT
    capacities: Capacities | None = None
    recalibrate: bool = True
    average: Average = "mean"
    overlaps: Callable[[int], float] | None = None
    _submodels: dict[tuple[Use | int, ...], SubModel] = field(default_factory=dict, repr=False)
    _windows: dict[int, dict[int, Window]] = field(default_factory=dict, repr=False)

    def window(self, round_index: int, participant: int) -> Window:
        """The units that a participant holds in a round; known to both sides, so it does not travel."""
        if self._windows.keys() - {round_index}:
            self._windows.clear()  # nobody asks for an earlier round's again
        held = self._windows.setdefault(round_index, {})
        if participant not in held:
            held[participant] = self._scheduled(round_index, participant)
        return held[participant]

    def window_of(self, task: Task) -> Window:
        """The units that a participant trains with a task (on both sides)."""
        return self.window(task.round_index, task.participant)

    def overlap(self, round_index: int, state: State | None = None) -> float | None:
        """The share of its window that a participant has in common with its neighbour; None of a rival."""
        return None if self.overlaps is None else self.overlaps(round_index)

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """The participant's slice of the global state."""
        slice_ = extract(model_state(state), self.width_map, self.window(round_index, participant))
        return Task(participant, round_index, without_aliases(slice_, self.width_map.aliases))

    def train(self, task: Task, data: Batch) -> Update:
        """Some steps on the participant's own examples, in its sub-model."""
        return self._trained_in(self.window_of(task), task, data)

    def _trained_in(self, window: Window, task: Task, data: Batch) -> Update:
        submodel = loaded(self._submodel(window), with_aliases(task.tensors, self.width_map.aliases))
        settings, objective = self.training[task.participant], self._objective(task, window)
        update = train_update(submodel, task, data, settings, self.seed, self.width_map, objective)
        return with_memory(update) if self.remembers else update

    @property
    def remembers(self) -> bool:
        """What the contrastive loss compares with."""
        return self.contrastive.weight > 0

    def check_together(self) -> None:
        """Raise ConfigError where sub-models cannot be stacked."""
        refuse_contrastive(self.contrastive)
        refuse_own_loss(self.scoring)
        refuse_own_training(self.training)
        if self.constants_narrow:
            raise ConfigError(
                "this model's participants cannot be trained together, because it has constants that differ "
                "between windows of equal size: set together to 1"
            )
        check_stackable(self._submodel(self.window(0, 0)))

    def groups(
        self, round_index: int, participants: Sequence[int], data: Sequence[Batch], limit: int
    ) -> list[tuple[int, ...]]:
        """Participants whose windows have equal sizes."""

        def sizes(participant: int) -> tuple[int, ...]:
            return self._sizes(self.window(round_index, participant))

        return groups_of(participants, data, self.training, limit, sizes)

    def train_together(self, tasks: Sequence[Task], data: Sequence[Batch]) -> list[Update]:
        """What `train` gives for each of a group."""
        first = tasks[0]
        submodel = self._submodel(self.window(first.round_index, first.participant))
        return updates_together(submodel, tasks, data, self.training[first.participant], self.seed)

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        """The sub-model's tensors, as they came; of a measurement the moments."""
        if kind == "measure":
            return batch_norm.measured_outbound(self.model, task.tensors)
        return super().outbound(kind, task)

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """Overlap averaging; an entry that nobody held keeps its value."""
        weights = model_state(state)
        accumulator = accumulator_for(weights, self.width_map, self.average)
        for task, update in answered:
            add_update(accumulator, weights, self.window_of(task), update, self.weighting, self.width_map)
        return {**state, **accumulator.result()}

    def entries(self, task: Task) -> dict[str, Entries]:
        """Those of its window."""
        cuts = plan(self.width_map, self.window_of(task))
        return {name: Entries(name, cuts[name]) for name in task.tensors if name in cuts}

    def weight_in_sums(self, examples: int) -> int:
        """As `weighting` says. Raises ConfigError where windows differ, or the average is no mean."""
        if type(self) is not NarrowMethod:
            return super().weight_in_sums(examples)
        alike = len(set(self.ratios)) == 1 if self.capacities is None else self.capacities.alike
        if self.schedule is not full and not (self.schedule is static and alike):
            raise ConfigError(
                f"method.secure and method.privacy do not go with {self.name}, whose participants hold different "
                "windows: a sum of few would say much of each; choose method.name = 'fedavg' or 'small', or "
                "method.start = 'blocks'"
            )
        return weight_in_mean(examples, self.weighting, self.average)

    @property
    def recalibrates(self) -> bool:
        """Whether BatchNorm's statistics, which in narrow models are not the fused one's, are to be measured anew."""
        return self.recalibrate and batch_norm.has_running_statistics(self.model)

    def measurement(self, state: State, round_index: int, participant: int) -> Task:
        """The fused model, for a forward pass."""
        return Task(participant, round_index, without_aliases(model_state(state), self.width_map.aliases))

    def measure(self, task: Task, data: Batch) -> Update:
        """The moments of the participant's examples in front of every BatchNorm."""
        with holding(self.model, with_aliases(task.tensors, self.width_map.aliases)) as model:
            return batch_norm.measured_update(model, task, data, self.training[task.participant], self.seed)

    def settle(self, state: State, updates: Iterable[Update]) -> dict[str, Tensor]:
        """The state with the running statistics pooled over the participants."""
        return {**state, **batch_norm.pooled(state, updates)}

    def sharding(self) -> Sharding:
        """Rows of the whole model. Raises ConfigError where it cannot be divided."""
        check_divisible(self, NarrowMethod, self.average)
        return self._divided(lambda shard: {})

    def _divided(self, own: Callable[[ShardMap], dict[str, Any]]) -> Sharding:
        """Rows of the whole model; `own` has what else is another on a shard."""
        program = program_of(self.width_map)

        def on(shard: ShardMap, cut: Callable[[State], dict[str, Tensor]]) -> NarrowMethod:
            return replace(self, width_map=shard, _windows={}, _submodels={}, **own(shard))

        def measure(read: Read, at_work: tuple[Task, Batch] | None) -> Update | None:
            if at_work is None:
                batch_norm.measure_by_layers(program, lambda name: read([name])[name], [])
                return None
            task, data = at_work
            batches = batch_norm.measured_batches(task, data, self.training[task.participant], self.seed)
            found = batch_norm.measure_by_layers(program, lambda name: read([name])[name], batches)
            return batch_norm.moments_update(task, data, batches, *found)

        return Sharding(
            first=self.initial_state(),
            width_map=self.width_map,
            on=on,
            carrier=self,
            evaluate=lambda read, notes, data: evaluated_by_layers(program, self.scoring, read, data),
            window=self.window,
            measure=measure,
        )

    def _objective(self, task: Task, window: Window) -> Objective:
        """Cross-entropy; with the contrastive loss where the participant remembers a sub-model of its own."""
        if self.contrastive.weight == 0 or not task.memory:
            return self.scoring.objective
        aliases = self.width_map.aliases
        tensors, round_index = recalled(task.memory)
        earlier = self._scheduled(round_index, task.participant)
        received = frozen(self._submodel(window, "received"), with_aliases(task.tensors, aliases))
        previous = frozen(self._submodel(earlier, "previous"), with_aliases(tensors, aliases))
        return ContrastiveObjective(received, previous, self.contrastive, task.round_index)

    def _scheduled(self, round_index: int, participant: int) -> Window:
        """The window of any round, computed anew."""
        changing, own = self.capacities, self.width_map
        return self.schedule(
            own.whole
            if isinstance(own, ShardMap)
            else own,  # the windows of a shard are those of the whole model
            participant,
            round_index,
            self.ratios[participant] if changing is None else changing.ratio(participant, round_index),
            participants=len(self.ratios),
            seed=self.seed,
        )

    def _submodel(self, window: Window, use: Use = "training") -> SubModel:
        """A sub-model for a window: one per process, use and sizes, its tensors to be overwritten."""
        if self.constants_narrow:
            return narrow(self.model, self.width_map, window, self.scaling)
        key = (use, *self._sizes(window))
        if key not in self._submodels:
            self._submodels[key] = narrow(self.model, self.width_map, window, self.scaling)
        return self._submodels[key]

    @property
    def scaling(self) -> bool | OwnScale:
        """How sums over narrowed axes are scaled in sub-models."""
        return True

    def trained_at(self, ratio: float) -> nn.Module:
        """A model of the shapes that a participant of a ratio trains: the model itself where nothing is narrowed."""
        window = static(self.width_map, 0, 0, ratio, participants=1)
        if self.schedule is full or all(len(window[g.name]) == g.units for g in self.width_map.groups):
            return self.model
        return narrow(self.model, self.width_map, window)

    def _sizes(self, window: Window) -> tuple[int, ...]:
        """How many units of each group a window holds."""
        return tuple(len(window.get(group.name, range(group.units))) for group in self.width_map.groups)

    @cached_property
    def constants_narrow(self) -> bool:
        """Whether a tensor outside the state dict depends on the window: no other window can use it then."""
        places = (place for group in self.width_map.groups for place in group.places)
        return any(place.tensor not in self.width_map.shapes for place in places)


Narrow = TypeVar("Narrow", bound=NarrowMethod)


def extended(method: NarrowMethod, kind: type[Narrow], **others: Any) -> Narrow:
    """A method of another class, with the fields of a narrow method but for `others`, which it may have besides."""
    same = {each.name: getattr(method, each.name) for each in fields(NarrowMethod)}
    return kind(**{**same, **others})


def train_update(
    model: nn.Module,
    task: Task,
    data: Batch,
    settings: TrainingSettings,
    seed: int,
    width_map: WidthMap,
    objective: Objective = cross_entropy,
) -> Update:
    """Train a model that holds the task's tensors; the update has copies of what it then holds."""
    trained = local_steps(
        model,
        data,
        settings,
        seed=seed,
        round_index=task.round_index,
        participant=task.participant,
        objective=objective,
    )
    tensors = without_aliases(state_of(model), width_map.aliases)
    return trained_update(task, data, trained, tensors)


def weight_of(update: Update, weighting: Weighting) -> float:
    """The weight a_p of an update in the average."""
    return float(update.examples) if weighting == "examples" else 1.0


def weight_in_mean(examples: int, weighting: Weighting, average: Average) -> int:
    """The weight of a participant with so many examples. Raises ConfigError where the average needs single updates."""
    if average != "mean":
        raise ConfigError(
            f"method.secure and method.privacy do not go with method.average = '{average}', which has to see each "
            "update by itself: leave one of them out"
        )
    return examples if weighting == "examples" else 1


def with_memory(update: Update) -> Update:
    """The update of a participant that keeps what it trained, for the contrastive loss of its next round."""
    return replace(update, memory=remembered(update.tensors, update.round_index))


def add_update(
    accumulator: Accumulator,
    state: State,
    window: Window,
    update: Update,
    weighting: Weighting,
    width_map: WidthMap,
) -> None:
    """Add an update to the average. Raises UpdateError, naming the participant, where it does not fit.

    Of an update that counts only in part the present state has the other part, so that an entry which nobody
    else held moves by that part instead of falling back to the round in which the update began.
    """
    rest = extract(state, width_map, window) if update.share < 1 else None
    with blamed(update) as source:
        tensors, weight = with_aliases(update.tensors, width_map.aliases), weight_of(update, weighting)
        accumulator.add_part(window, tensors, weight, share=update.share, rest=rest, source=source)
