"""Fed-Grow: participants with small models of their own learn together how to grow a large one (arXiv 2406.13450).

Dual-LiGO has two growth operators, one after the other: a private one from a participant's own small model to an
intermediate that is equally large for all, and a shared one from the intermediate to the target.

    in its first round, participant p, for itself:
        small_p         <-  trained on p's data, then frozen                      its own width, depth and heads
        Local-LiGO_p    <-  fitted through the intermediate that it makes         private
        intermediate_p  <-  Local-LiGO_p(small_p), made once                      private, remembered
    for each round t:
        for each participant p of the round:
            Global-LiGO_p  <-  Global-LiGO after some steps on p's data,          assign, train
                               through the target Global-LiGO_p(intermediate_p)
        Global-LiGO  <-  sum n_p Global-LiGO_p / sum n_p                          fuse
    then, if so chosen: every participant trains its own target further, alone or federated

The global state is Global-LiGO and nothing else: names and shapes follow from intermediate and target. Every
participant's target differs, so each reports how good its own is. The rivals are other stages of the same loop
(`GrowSettings`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from msfusion.averaging.fusion import Accumulator
from msfusion.batch import Batch
from msfusion.errors import ConfigError
from msfusion.federated.method import TRAINED, Answered, Kind, Method, Task, Update, trained_update
from msfusion.federated.privacy import Form, Outbound, forms_of
from msfusion.federated.reporting import REPORTED, nothing_to_report, report_of
from msfusion.federated.states import (
    aliases_of,
    holding,
    labelled,
    loaded,
    part,
    placed,
    state_of,
    with_aliases,
    without_aliases,
)
from msfusion.federated.training import Trained, local_steps
from msfusion.growth.fit import GrownModel
from msfusion.growth.ligo import LiGO
from msfusion.growth.plan import GrowthPlan
from msfusion.methods.fedgrow.private import Grower, private_stages, trained_small
from msfusion.methods.fedgrow.settings import GrowSettings
from msfusion.methods.narrow import Weighting, add_update
from msfusion.objectives import Evaluation, evaluate_for
from msfusion.scoring import CROSS_ENTROPY, Scoring
from msfusion.width.groups import State, WidthMap


@dataclass(frozen=True, eq=False, repr=False)
class GrowMethod(Method):
    """Dual-LiGO, or one of its rivals; made with `grow_method`. Models are templates and working space.

    `plan` is how the intermediate grows into the target; without an operator both are None. `fresh` are the target's
    own weights, for training from scratch; `weighting` says what a participant weighs in the average. With
    `own_labels`, everybody also says what the model is worth to it: in its own proportions of labels.
    """

    name: str
    target: nn.Module
    settings: GrowSettings
    growers: tuple[Grower, ...] = ()
    intermediate: nn.Module | None = None
    plan: GrowthPlan | None = None
    fresh: State = field(default_factory=dict, repr=False)
    seed: int = 0
    scoring: Scoring = CROSS_ENTROPY
    own_labels: bool = False
    weighting: Weighting = "examples"

    def initial_state(self) -> dict[str, Tensor]:
        """Global-LiGO where it starts; of a federated target from scratch its fresh weights; else nothing."""
        if "operator" in self.settings.leaving(0):
            return self._first_operator()
        federated = self.settings.growth == "scratch" and self.settings.further == "federated"
        return self._fresh_target() if federated else {}

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """All that there is in common."""
        return Task(participant, round_index, state)

    def train(self, task: Task, data: Batch) -> Update:
        """A round of the operator, or of the target; before, the private stages where there is no model yet."""
        known = {**task.memory, **task.tensors}
        if not part(known, "intermediate") and not part(known, "target"):
            known |= self._begin(task.participant, data)
        stage = self._grow if self.settings.growing(task.round_index) else self._go_on
        trained, made = stage(known, task, data)
        known |= made
        kept = {n: t for n, t in known.items() if _label(n) in self.settings.kept(task.round_index)}
        if all(tensor is task.memory.get(name) for name, tensor in kept.items()):
            kept = {}  # nothing new
        sent = {name: known[name] for name in self.leaving(task.round_index)}
        return replace(trained_update(task, data, trained, sent), memory=kept)

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        """Global-LiGO alone, unless the settings say that something else leaves in such a round."""
        return REPORTED if kind == "report" else Outbound(self.leaving(task.round_index), TRAINED)

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """The weighted average. An operator that comes late, when targets are averaged, is let go."""
        averages: dict[bool, tuple[Accumulator, WidthMap]] = {}
        for task, update in answered:
            forms, growing = self.leaving(task.round_index), self.settings.growing(task.round_index)
            if not forms:
                continue
            if growing not in averages:
                averages[growing] = _empty_average(forms)
            before = {name: state[name] for name in forms if name in state}
            if len(before) < len(forms):  # there is nothing yet that could stand in for a late update's rest
                update = replace(update, share=1.0)
            accumulator, shapes = averages[growing]
            add_update(accumulator, before, {}, update, self.weighting, shapes)
        if False in averages:
            return averages[False][0].result()
        targets_met = bool(part(state, "target")) and self.settings.share != "everything"
        return averages[True][0].result() if True in averages and not targets_met else dict(state)

    def personal(self, state: State) -> bool:
        """Whether participants' models differ: they do unless intermediate or target is common."""
        return not part(state, "intermediate") and not part(state, "target")

    def asks(self, state: State) -> bool:
        """Whether participants must say how good the model is: theirs differ, or their labels count."""
        return self.own_labels or self.personal(state)

    def evaluate(self, state: State, data: Batch) -> Evaluation:
        """How good the model is that all have in common. Raises ConfigError where there is none."""
        grown = self._grown(state, growing=True)
        if grown is None:
            raise ConfigError(
                f"with {self.name} every participant has a model of its own: only it can evaluate it"
            )
        return self._evaluate(grown, data)

    def grown(self, task: Task) -> dict[str, Tensor] | None:
        """A participant's grown model as a state dict, from an examination and its memory; None if there is none."""
        return self._grown({**task.memory, **task.tensors}, self.settings.growing(task.round_index))

    def report(self, task: Task, data: Batch, test: Batch) -> Update:
        """How good a participant's grown model is."""
        grown = self.grown(task)
        if grown is None:
            return nothing_to_report(task)
        if not self.own_labels:
            return report_of(task, self._evaluate(grown, test))
        with holding(placed(self.target, grown), grown) as model:
            return report_of(task, *evaluate_for(model, test, data.targets, self.scoring.batch_size))

    def _begin(self, participant: int, data: Batch) -> dict[str, Tensor]:
        """What a participant grows from: its intermediate model, or a target by copies or from scratch."""
        device = data.targets.device
        if self.settings.growth == "scratch":
            return _on(device, self._fresh_target())
        if participant >= len(self.growers):
            raise ConfigError(
                f"participant {participant} has no small model: give one for each participant, not {len(self.growers)}"
            )
        grower = self.growers[participant]
        if grower.copy is not None:
            small = trained_small(grower.small, participant, data, self.settings.pretraining, self.seed)
            return self._named("target", grower.copy.materialise(small))
        assert self.intermediate is not None
        stages = private_stages(grower, self.intermediate, participant, data, self.settings, self.seed)
        alone = _on(device, self._first_operator()) if self.settings.share == "nothing" else {}
        return self._named("intermediate", stages.intermediate) | alone

    def _grow(self, known: State, task: Task, data: Batch) -> tuple[Trained, dict[str, Tensor]]:
        """Some steps of Global-LiGO, through the target that it makes."""
        operator = self._operator(known)
        model = GrownModel(operator, self._whole("intermediate", known), placed(self.target, known))
        trained = self._steps(model, task, data)
        made = labelled("operator", {name: tensor.clone() for name, tensor in operator.tensors().items()})
        if "target" in self.settings.leaving(task.round_index):
            grown = self._grown({**known, **made}, growing=True)
            assert grown is not None
            made |= self._named("target", grown)
        return trained, made

    def _go_on(self, known: State, task: Task, data: Batch) -> tuple[Trained, dict[str, Tensor]]:
        """Some steps of the grown target itself."""
        grown = self._grown(known, growing=False)
        assert grown is not None
        model = loaded(self.target, grown)
        return self._steps(model, task, data), self._named("target", state_of(model))

    def _steps(self, model: nn.Module, task: Task, data: Batch) -> Trained:
        now, who = task.round_index, task.participant
        settings = self.settings.training_in(now)
        return local_steps(model, data, settings, seed=self.seed, round_index=now, participant=who)

    def _grown(self, known: State, growing: bool) -> dict[str, Tensor] | None:
        """The target's whole state: while operators train, what they make of the intermediate; None without any."""
        has_target = bool(part(known, "target"))
        if part(known, "intermediate") and part(known, "operator") and (growing or not has_target):
            with torch.no_grad():
                return self._operator(known).materialise(self._whole("intermediate", known))
        return self._whole("target", known) if has_target else None

    def _evaluate(self, grown: State, data: Batch) -> Evaluation:
        with holding(placed(self.target, grown), grown) as model:
            return self.scoring.evaluate(model, data)

    def _operator(self, known: State) -> LiGO:
        """The working operator with the tensors of Global-LiGO, on the device where they are."""
        tensors = part(known, "operator")
        operator = self._working_operator
        placed(operator, tensors)
        operator.load_tensors(tensors)
        return operator

    @cached_property
    def _working_operator(self) -> LiGO:
        return self.new_operator()

    def new_operator(self) -> LiGO:
        """Global-LiGO where it starts; there must be a plan."""
        assert self.plan is not None
        start, form, tied = self.settings.start, self.settings.form, self.settings.tied
        return LiGO(self.plan, start, form=form, tied=tied, seed=self.seed)

    def _first_operator(self) -> dict[str, Tensor]:
        """Global-LiGO as everybody can make it."""
        return labelled("operator", self.new_operator().tensors())

    def _fresh_target(self) -> dict[str, Tensor]:
        return self._named("target", {name: tensor.clone() for name, tensor in self.fresh.items()})

    def leaving(self, round_index: int) -> dict[str, Form]:
        """The names, types and shapes of what leaves a participant in a round."""
        leaving = self.settings.leaving(round_index)
        return {name: form for name, form in self._forms.items() if _label(name) in leaving}

    @property
    def whole(self) -> nn.Module:
        """A model of the target's shape: nothing else that is federated has running statistics."""
        return self.target

    def after(self, round_index: int) -> dict[str, Tensor]:
        """A global state as it is after a round, without values."""
        forms = self.leaving(round_index)
        return {
            name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in forms.items()
        }

    @cached_property
    def _forms(self) -> dict[str, Form]:
        """Names, types and shapes of all that could travel."""
        forms = forms_of(self._named("target", self.target.state_dict()))
        if self.intermediate is not None:
            forms |= forms_of(self._first_operator())
            forms |= forms_of(self._named("intermediate", self.intermediate.state_dict()))
        return forms

    @cached_property
    def _aliases(self) -> Mapping[str, Mapping[str, str]]:
        models = {"target": self.target, "intermediate": self.intermediate}
        return {label: aliases_of(model) for label, model in models.items() if model is not None}

    def _named(self, label: str, state: State) -> dict[str, Tensor]:
        """A model's tensors under its label, a tied one once."""
        return labelled(label, without_aliases(state, self._aliases[label]))

    def _whole(self, label: str, tensors: State) -> dict[str, Tensor]:
        """The opposite: a model's state."""
        return with_aliases(part(tensors, label), self._aliases[label])


def _empty_average(forms: Mapping[str, Form]) -> tuple[Accumulator, WidthMap]:
    shapes = WidthMap((), {name: shape for name, (_, shape) in forms.items()}, ())
    blank = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in forms.items()}
    return Accumulator(blank, shapes), shapes


def _label(name: str) -> str:
    return name.partition(".")[0]


def _on(device: torch.device, tensors: State) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
