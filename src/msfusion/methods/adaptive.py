"""MSfusion whose overlap follows the participants: more where they disagree about what they share, less where
they agree.

The overlap of the next round is part of the global state, so a run that is killed resumes with it; it travels to the
participants with each task, because the windows depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from msfusion.averaging.disagreement import Disagreement
from msfusion.batch import Batch
from msfusion.errors import ConfigError
from msfusion.federated.compression import Entries
from msfusion.federated.method import Answered, Task, Update
from msfusion.federated.states import model_state, with_aliases
from msfusion.methods.narrow import NarrowMethod, extended, weight_of
from msfusion.width.groups import State
from msfusion.windows import Feedback, Overlap, double_shift_for

OVERLAP = ".overlap"
"""Its name in the global state. No tensor of a model is called so: their names never begin with a dot."""


@dataclass(frozen=True, eq=False, repr=False)
class AdaptiveMethod(NarrowMethod):
    """A narrow method with the windows of MSfusion, whose overlap a feedback rule sets from round to round.

    Its own `schedule` is that of the first overlap: an overlap moves windows, it does not resize them.
    """

    feedback: Feedback = field(kw_only=True)
    between_rounds: bool = field(default=True, kw_only=True)
    _at: dict[float, NarrowMethod] = field(default_factory=dict, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.contrastive.weight > 0 and self.constants_narrow:
            raise ConfigError(
                "this model has constants that are narrowed, so a participant's previous sub-model cannot be "
                "rebuilt under another overlap: use the contrastive loss or an overlap by feedback, not both"
            )

    def at(self, overlap: float) -> NarrowMethod:
        """The method with the windows of one overlap."""
        if overlap not in self._at:
            self._at.clear()  # an overlap seldom comes back
            fixed = Overlap("constant", overlap)
            schedule = double_shift_for(self.ratios, fixed, between_rounds=self.between_rounds)
            self._at[overlap] = extended(self, NarrowMethod, schedule=schedule, _windows={})
        return self._at[overlap]

    @property
    def first_overlap(self) -> float:
        """The overlap of the first round."""
        return self.feedback.bounded(self.feedback.start, self.ratios)

    def with_overlap(self, overlap: float | None) -> NarrowMethod:
        """The same as `at`; without one the first."""
        return self.at(self.first_overlap if overlap is None else overlap)

    def overlap(self, round_index: int, state: State | None = None) -> float:
        """What the state says."""
        return self.first_overlap if state is None else float(state[OVERLAP])

    def initial_state(self) -> dict[str, Tensor]:
        """The model's own weights, and the first overlap."""
        first = torch.tensor(self.first_overlap, dtype=torch.float64)
        return {**super().initial_state(), OVERLAP: first}

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """The participant's slice of the global state, and the overlap that says which."""
        overlap = float(state[OVERLAP])
        task = self.at(overlap).assign(state, round_index, participant)
        return replace(task, metadata={**task.metadata, "overlap": overlap})

    def entries(self, task: Task) -> dict[str, Entries]:
        """Those of its window, which the task's overlap says."""
        return self.at(float(task.metadata["overlap"])).entries(task)

    def train(self, task: Task, data: Batch) -> Update:
        """As every narrow method does."""
        return self.at(float(task.metadata["overlap"])).train(task, data)

    def train_together(self, tasks: Sequence[Task], data: Sequence[Batch]) -> list[Update]:
        """As every narrow method does."""
        return self.at(float(tasks[0].metadata["overlap"])).train_together(tasks, data)

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """Overlap averaging, and from the disagreement about shared entries the next overlap."""
        overlap = float(state[OVERLAP])
        method, disagreement = self.at(overlap), Disagreement(model_state(state), self.width_map)

        def observed() -> Iterator[tuple[Task, Update]]:
            for task, update in answered:
                yield task, update  # fusion checks it first
                window = method.window(task.round_index, task.participant)
                tensors = with_aliases(update.tensors, self.width_map.aliases)
                disagreement.add(window, tensors, weight_of(update, self.weighting))

        fused = method.fuse(state, observed())
        following = self.feedback.after(overlap, disagreement.value(), self.ratios)
        return {**fused, OVERLAP: torch.tensor(following, dtype=torch.float64)}
