"""Training a growth operator through the model that it makes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from msfusion.batch import Batch
from msfusion.errors import DataError, GrowthError, TrainingError
from msfusion.growth.ligo import LiGO
from msfusion.objectives import Objective, cross_entropy, gradient_step
from msfusion.setting import check, setting
from msfusion.width.groups import State


@dataclass(frozen=True)
class FitSettings:
    """How an operator is trained. LiGO's own (section 4.1): 100 steps of AdamW, gradients clipped to norm 1.

    The learning rate rises over the first `warmup` share of the steps and falls linearly to zero with the last: it is
    relative to the stage's own length, because a warm-up that is longer than the stage leaves the operator untrained.
    Raises GrowthError, naming the setting, for impossible values.
    """

    steps: int = setting(100, "of AdamW", ge=1)
    learning_rate: float = setting(1e-3, "at its highest, after the warm-up", gt=0)
    warmup: float = setting(0.1, "share of the steps in which the learning rate rises", ge=0, lt=1)
    batch_size: int = setting(32, "examples of a mini-batch", ge=1)
    weight_decay: float = setting(0.0, "AdamW's", ge=0)
    clip_norm: float | None = setting(1.0, "bounds the l2 norm of the gradient in each step", gt=0)
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, GrowthError)

    def batch_sizes(self, examples: int) -> list[int]:
        """The sizes of all mini-batches, where there are so many examples."""
        full, rest = divmod(examples, self.batch_size)
        epoch = [self.batch_size] * full + [rest] * (rest > 0)
        return (epoch * self.steps)[: self.steps]

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0; never zero, so that every step trains."""
        rising = max(1, round(self.warmup * self.steps))
        falling = self.steps - rising
        share = (step + 1) / rising if step < rising else (self.steps - step) / (falling + 1)
        return self.learning_rate * share


class GrownModel(nn.Module):
    """A target model whose weights an operator makes anew at every call. Its parameters are the operator's alone.

    The tensors of the source and the target's own neither train nor change.
    """

    def __init__(self, operator: LiGO, source: State, target: nn.Module) -> None:
        super().__init__()
        operator.plan.check(source)
        self.operator = operator
        self._source = {name: tensor.detach() for name, tensor in source.items()}
        self._target = [target]  # in a list, so that its parameters are not this module's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the grown model returns, in this module's mode; the target is left in its own."""
        (target,) = self._target
        modes = {module: module.training for module in target.modules()}
        target.train(self.training)
        try:
            return functional_call(target, self.operator.materialise(self._source), args, kwargs)
        finally:
            for module, mode in modes.items():
                module.training = mode


def fit_operator(
    operator: LiGO,
    source: State,
    target: nn.Module,
    data: Batch,
    settings: FitSettings | None = None,
    objective: Objective = cross_entropy,
) -> list[float]:
    """Train an operator in place so that the target which it makes from `source` is good; the loss before each step.

    `target` gives the architecture alone: its tensors are left as they are. The result depends on the arguments alone.
    Raises TrainingError where the loss is not finite, DataError where there are no examples, GrowthError where the
    state is not the source's.
    """
    settings = settings or FitSettings()
    if len(data) == 0:
        raise DataError("there are no examples to train the growth operator on: give it some")
    model = GrownModel(operator, source, target)
    optimizer = torch.optim.AdamW(
        operator.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    losses: list[float] = []
    try:
        model.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            for step, batch in enumerate(_batches(data, settings)):
                optimizer.param_groups[0]["lr"] = settings.rate_at(step)
                losses.append(gradient_step(model, batch, optimizer, settings.clip_norm, objective))
                if not math.isfinite(losses[-1]):
                    raise TrainingError(
                        f"the operator's loss became {losses[-1]} in step {step + 1}: lower the learning rate "
                        f"(it is {settings.learning_rate:g})"
                    )
    finally:
        optimizer.zero_grad(set_to_none=True)
    return losses


def _batches(data: Batch, settings: FitSettings) -> Iterator[Batch]:
    """As many mini-batches as there are steps: the examples in a new order in each epoch."""
    generator = torch.Generator().manual_seed(settings.seed)
    left = settings.steps
    while left > 0:
        for batch in data.shuffled(settings.batch_size, generator):
            if left > 0:
                yield batch
            left -= 1
