"""Local training of several participants at once: their sub-models, equal in shape, are stacked and run as one.

The readable reference is `training.local_steps`, one participant after the other; this gives the same numbers but
for rounding. A small model keeps neither a GPU nor, operator by operator, a core busy; many small models do.

    W[name]  <-  everybody's tensors [participants, ...], whoever has the most steps first
    for each step:
        drop from the end of W, and of the optimiser's state, who has no mini-batch left
        loss[i]  <-  mean cross-entropy of participant i's model on its own mini-batch      (torch.vmap)
        W        <-  one step of the optimiser, which knows no participants: it works entry by entry

Who has finished is dropped as a view: nothing touches its rows again. A short mini-batch is filled up with examples
whose targets are IGNORED.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from msfusion.batch import IGNORED, Batch
from msfusion.errors import ConfigError
from msfusion.federated.method import Task, Update, trained_update
from msfusion.federated.states import placed
from msfusion.federated.training import (
    Trained,
    TrainingSettings,
    build_optimizer,
    check_finite,
    round_batches,
)
from msfusion.methods.parts.contrastive import ContrastiveSettings
from msfusion.objectives import aligned, check_labels, scores
from msfusion.offsets import full
from msfusion.scoring import Scoring
from msfusion.width.stacked import run_stacked
from msfusion.width.submodel import SubModel


def groups_of(
    participants: Sequence[int],
    data: Sequence[Batch],
    settings: Sequence[TrainingSettings],
    limit: int,
    alike: Callable[[int], Hashable],
) -> list[tuple[int, ...]]:
    """Who trains together, at most `limit` at once: those with equal `alike`, settings and shapes of examples.

    Neighbours in their number of steps and examples come together, so that little is filled up. `data` and
    `settings` have one entry per participant. The result depends on the arguments alone.
    """
    kinds: dict[Hashable, list[int]] = {}
    for participant in participants:
        kind = (alike(participant), settings[participant], _outline(data[participant]))
        kinds.setdefault(kind, []).append(participant)
    groups = []
    for members in kinds.values():
        members.sort(key=lambda each: (-_steps(data[each], settings[each]), -len(data[each]), each))
        count = math.ceil(len(members) / limit)
        cuts = [len(members) * index // count for index in range(count + 1)]
        groups += [tuple(members[a:b]) for a, b in pairwise(cuts)]
    return groups


def refuse_contrastive(settings: ContrastiveSettings) -> None:
    """Raise ConfigError where participants are to train with the contrastive loss, which needs models of its own."""
    if settings.weight > 0:
        raise ConfigError(
            "participants that train with the contrastive loss cannot be trained together: set "
            "contrastive_weight to 0 or together to 1"
        )


def refuse_own_training(training: Sequence[TrainingSettings]) -> None:
    """Raise ConfigError where a step is not the same for stacked tensors."""
    if not all(each.stacks for each in training):
        raise ConfigError(
            "participants with another precision, or an optimiser of their own, cannot be trained together: set "
            "together to 1"
        )


def refuse_own_loss(scoring: Scoring) -> None:
    """Raise ConfigError where the loss is one's own: only cross-entropy is known to be told apart by participant."""
    if scoring.loss is not None:
        raise ConfigError(
            "participants with a loss of their own cannot be trained together: set together to 1"
        )


def updates_together(
    model: SubModel, tasks: Sequence[Task], data: Sequence[Batch], settings: TrainingSettings, seed: int
) -> list[Update]:
    """The updates of several participants of one round, in the order of their tasks.

    `model` is of their shape, its own tensors do not matter; `data` has the examples of each. Raises as
    `local_steps` does.
    """
    steps = [_steps(own, settings) for own in data]
    order = sorted(range(len(tasks)), key=lambda index: -steps[index])
    placed(model, tasks[0].tensors)
    group = _Group(model, [tasks[index] for index in order], settings)
    trained = group.train([data[index] for index in order], seed)
    updates: dict[int, Update] = {}
    for row, (index, done) in enumerate(zip(order, trained, strict=True)):
        updates[index] = trained_update(tasks[index], data[index], done, group.tensors(row))
    return [updates[index] for index in range(len(tasks))]


@dataclass
class _Tally:
    """What a participant's steps add up to."""

    loss: float = 0.0
    examples: int = 0
    steps: int = 0

    def add(self, loss: float, examples: int) -> None:
        """Note a step's mean loss over so many examples."""
        self.loss += loss * examples
        self.examples += examples
        self.steps += 1

    @property
    def trained(self) -> Trained:
        """The same as `local_steps` reports it."""
        return Trained(self.loss / self.examples, self.examples, self.steps)


class _Group:
    """The stacked tensors of a group; `tasks` in the order in which they are stacked."""

    def __init__(self, model: SubModel, tasks: Sequence[Task], settings: TrainingSettings) -> None:
        self.model, self.tasks, self.settings = model, tasks, settings
        self.stacked = {
            name: torch.stack([task.tensors[name].detach() for task in tasks]) for name in tasks[0].tensors
        }
        named = model.named_parameters(remove_duplicate=False)
        training = {name for name, own in named if own.requires_grad}
        self.parameters = {
            name: nn.Parameter(tensor) for name, tensor in self.stacked.items() if name in training
        }
        self.others = {name: tensor for name, tensor in self.stacked.items() if name not in training}
        self.active = len(tasks)
        whole = nn.ParameterList(self.parameters.values())
        self.optimizer = build_optimizer(whole, settings, tasks[0].round_index)

    def train(self, data: Sequence[Batch], seed: int) -> list[Trained]:
        """All steps of everybody. Nobody has more steps than those before."""
        settings, tallies = self.settings, [_Tally() for _ in data]
        self.model.train()
        for step, batches in enumerate(_rows(data, self.tasks, settings, seed), 1):
            self._keep(len(batches))
            if step == 1:
                self._check(batches[0])
            for task, tally, batch, loss in zip(
                self.tasks, tallies, batches, self._step(batches), strict=False
            ):
                check_finite(
                    loss, settings, round_index=task.round_index, participant=task.participant, step=step
                )
                tally.add(loss, len(batch))
        self.optimizer.zero_grad(set_to_none=True)
        return [tally.trained for tally in tallies]

    def tensors(self, row: int) -> dict[str, Tensor]:
        """Copies of what a participant now holds."""
        return {name: tensor[row].clone() for name, tensor in self.stacked.items()}

    def _step(self, batches: Sequence[Batch]) -> list[float]:
        """One step of gradient descent; the losses before it."""
        stacked = stacked_batches(batches)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._losses(stacked)
        losses.sum().backward()  # type: ignore[no-untyped-call]  # nobody's loss knows another's weights
        if self.settings.clip_norm is not None:
            clip_each(list(self.parameters.values()), self.settings.clip_norm)
        self.optimizer.step()
        found: list[float] = losses.detach().tolist()
        return found

    def _losses(self, stacked: Batch) -> Float[Tensor, " participants"]:
        """Everybody's mean cross-entropy, as `objectives.mean_cross_entropy` has it."""

        def loss(call: Callable[..., Any], own_inputs: Any, own_targets: Tensor, *offset: Tensor) -> Tensor:
            output = Batch(own_inputs, own_targets).call(call)
            logits, flat = aligned(output, own_targets)
            # everybody's: values cannot be asked for one by one
            check_labels(stacked.targets, logits.shape[-1])
            for added in offset:
                logits = logits + added.reshape(logits.shape)
            total = F.cross_entropy(logits, flat, ignore_index=IGNORED, reduction="sum")
            return total / (flat != IGNORED).sum().clamp(min=1)

        given = (stacked.inputs, stacked.targets, *([] if stacked.offset is None else [full(stacked.offset)]))
        losses: Tensor = run_stacked(self.model, {**self.parameters, **self.others}, loss, *given)
        return losses

    def _keep(self, count: int) -> None:
        """Go on with the first participants only."""
        if count == self.active:
            return
        self.active = count
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.parameters.values():
            state = self.optimizer.state.get(parameter, {})
            for name, tensor in state.items():
                if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                    state[name] = tensor[:count]
            parameter.data = parameter.data[:count]
        self.others = {name: tensor[:count] for name, tensor in self.others.items()}

    def _check(self, batch: Batch) -> None:
        """Raise where the model's answer cannot be learnt from, before anything is stacked."""
        with torch.no_grad():
            scores(self.model, batch)


def clip_each(parameters: Sequence[nn.Parameter], clip_norm: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` for each participant by itself; they are on axis 0 of all parameters."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(gradient.reshape(len(gradient), -1), dim=1) for gradient in gradients]
    total = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    factors = (clip_norm / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


def stacked_batches(batches: Sequence[Batch]) -> Batch:
    """Everything with the participants on axis 0, short mini-batches filled up to the longest.

    Where some have an offset it is zero for the others.
    """
    most = max(len(batch) for batch in batches)
    filled = [_filled(batch, most) for batch in batches]
    inputs = pytree.tree_map(lambda *each: torch.stack(each), *[batch.inputs for batch in filled])
    targets = torch.stack([batch.targets for batch in filled])
    offsets = [None if batch.offset is None else full(batch.offset) for batch in filled]
    shown = next((offset for offset in offsets if offset is not None), None)
    if shown is None:
        return Batch(inputs, targets)
    added = [torch.zeros_like(shown) if offset is None else offset for offset in offsets]
    return Batch(inputs, targets, torch.stack(added))


def _filled(batch: Batch, size: int) -> Batch:
    """The mini-batch with its last example repeated, without targets: real inputs cannot give NaN."""
    if len(batch) == size:
        return batch
    filled = batch.take(torch.arange(size).clamp(max=len(batch) - 1))
    filled.targets[len(batch) :] = IGNORED
    return filled


def _rows(
    data: Sequence[Batch], tasks: Sequence[Task], settings: TrainingSettings, seed: int
) -> Iterator[list[Batch]]:
    """The mini-batches of each step, of those who have one: always the first of the participants."""
    streams = [
        round_batches(own, settings, seed=seed, round_index=task.round_index, participant=task.participant)
        for own, task in zip(data, tasks, strict=True)
    ]
    for row in zip_longest(*streams):
        yield [batch for batch in row if batch is not None]


def _steps(data: Batch, settings: TrainingSettings) -> int:
    return len(settings.batch_sizes(len(data)))


def _outline(data: Batch) -> Hashable:
    """Names, shapes without the axis of examples, and types of what a batch holds."""
    named = data.inputs.items() if isinstance(data.inputs, dict) else enumerate(data.inputs)
    shapes = tuple((name, tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in named)
    return (shapes, tuple(data.targets.shape[1:]), data.targets.dtype)
