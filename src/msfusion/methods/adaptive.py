"""MSfusion whose overlap follows the participants: more where they disagree about what they share, less where
they agree.

The overlap of the next round is part of the global state, so a run that is killed resumes with it; it travels to the
participants with each task, because the windows depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from msfusion.averaging.disagreement import Disagreement
from msfusion.batch import Batch
from msfusion.errors import ConfigError
from msfusion.federated.method import Kind, Task, Update
from msfusion.federated.privacy import Outbound
from msfusion.federated.states import model_state, with_aliases
from msfusion.methods.narrow import NarrowMethod, weight_of
from msfusion.objectives import Evaluation
from msfusion.width.groups import State, WidthMap
from msfusion.windows import Feedback, Overlap, double_shift_for

OVERLAP = ".overlap"
"""Its name in the global state. No tensor of a model is called so: their names never begin with a dot."""


@dataclass(frozen=True, eq=False)
class AdaptiveMethod:
    """A narrow method with the windows of MSfusion, whose overlap a feedback rule sets from round to round."""

    base: NarrowMethod
    feedback: Feedback
    between_rounds: bool = True
    _at: dict[float, NarrowMethod] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.base.contrastive.weight > 0 and self.base.constants_narrow:
            raise ConfigError(
                "this model has constants that are narrowed, so a participant's previous sub-model cannot be "
                "rebuilt under another overlap: use the contrastive loss or an overlap by feedback, not both"
            )

    def at(self, overlap: float) -> NarrowMethod:
        """The method with the windows of one overlap."""
        if overlap not in self._at:
            self._at.clear()  # an overlap seldom comes back
            fixed = Overlap("constant", overlap)
            schedule = double_shift_for(self.base.ratios, fixed, between_rounds=self.between_rounds)
            self._at[overlap] = replace(self.base, schedule=schedule, _windows={})
        return self._at[overlap]

    @property
    def first_overlap(self) -> float:
        """The overlap of the first round."""
        return self.feedback.bounded(self.feedback.start, self.base.ratios)

    def initial_state(self) -> dict[str, Tensor]:
        """The model's own weights, and the first overlap."""
        first = torch.tensor(self.first_overlap, dtype=torch.float64)
        return {**self.base.initial_state(), OVERLAP: first}

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """The participant's slice of the global state, and the overlap that says which."""
        overlap = float(state[OVERLAP])
        task = self.at(overlap).assign(model_state(state), round_index, participant)
        return replace(task, metadata={**task.metadata, "overlap": overlap})

    def train(self, task: Task, data: Batch) -> Update:
        """As every narrow method does."""
        return self.at(float(task.metadata["overlap"])).train(task, data)

    def check_together(self) -> None:
        """As every narrow method does."""
        self.base.check_together()

    def groups(
        self, round_index: int, participants: Sequence[int], data: Sequence[Batch], limit: int
    ) -> list[tuple[int, ...]]:
        """Participants whose windows have equal sizes: the overlap moves windows, it does not resize them."""
        return self.base.groups(round_index, participants, data, limit)

    def train_together(self, tasks: Sequence[Task], data: Sequence[Batch]) -> list[Update]:
        """As every narrow method does."""
        return self.at(float(tasks[0].metadata["overlap"])).train_together(tasks, data)

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        """As every narrow method declares."""
        return self.base.outbound(kind, task)

    def aggregate(self, state: State, updates: Iterable[Update]) -> dict[str, Tensor]:
        """Overlap averaging, and from the disagreement about shared entries the next overlap."""
        overlap, weights = float(state[OVERLAP]), model_state(state)
        method, disagreement = self.at(overlap), Disagreement(weights, self.base.width_map)

        def observed() -> Iterator[Update]:
            for update in updates:
                yield update  # fusion checks it first
                window = method.window(update.round_index, update.participant)
                tensors = with_aliases(update.tensors, self.base.width_map.aliases)
                disagreement.add(window, tensors, weight_of(update, method.weighting))

        fused = method.aggregate(weights, observed())
        following = self.feedback.after(overlap, disagreement.value(), self.base.ratios)
        return {**fused, OVERLAP: torch.tensor(following, dtype=torch.float64)}

    def evaluate(self, state: State, data: Batch) -> Evaluation:
        """How good the whole model is with this state."""
        return self.base.evaluate(model_state(state), data)

    @property
    def recalibrates(self) -> bool:
        """Whether the model has BatchNorm."""
        return self.base.recalibrates

    def measurement(self, state: State, round_index: int, participant: int) -> Task:
        """The fused model, for a forward pass."""
        return self.base.measurement(model_state(state), round_index, participant)

    def measure(self, task: Task, data: Batch) -> Update:
        """The moments of the participant's examples in front of every BatchNorm."""
        return self.base.measure(task, data)

    def settle(self, state: State, updates: Iterable[Update]) -> dict[str, Tensor]:
        """The state with the running statistics pooled over the participants."""
        return {**self.base.settle(model_state(state), updates), OVERLAP: state[OVERLAP]}

    @property
    def name(self) -> str:
        """The name in configurations and tables."""
        return self.base.name

    @property
    def model(self) -> nn.Module:
        """The template of the whole model."""
        return self.base.model

    @property
    def width_map(self) -> WidthMap:
        """Of the whole model."""
        return self.base.width_map
