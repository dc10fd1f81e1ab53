"""What a participant does with the model that it received: gradient descent on its own examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import ConfigError, DataError, TrainingError
from msfusion.objectives import Objective, cross_entropy, gradient_step
from msfusion.seeds import seed_of
from msfusion.setting import check, setting

OptimizerName = Literal["sgd", "adam", "adamw"]
LearningRateSchedule = Literal["constant", "cosine"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TrainingSettings:
    """How a participant trains in a round. Raises ConfigError, naming the setting, for impossible values.

    With the schedule "cosine" the learning rate falls over `rounds` rounds (SGDR, Loshchilov & Hutter 2017, equation 5,
    without restarts); within a round it is constant. With the precision "bfloat16" operators that are safe with it
    compute in it (torch.autocast), weights and updates stay as they are.
    """

    optimizer: OptimizerName = setting("sgd", "made anew in each round")
    learning_rate: float = setting(0.1, "of the first round, or of all", gt=0)
    momentum: float = setting(0.9, "of sgd; adam and adamw have betas of 0.9 and 0.999", ge=0, lt=1)
    weight_decay: float = setting(0.0, "the optimiser's own", ge=0)
    batch_size: int = setting(32, "examples of a mini-batch", ge=1, le=1_000_000)
    local_epochs: int = setting(1, "passes over a participant's own examples in a round", ge=1, le=10_000)
    max_steps: int | None = setting(None, "mini-batches after which a participant's round ends early", ge=1)
    clip_norm: float | None = setting(None, "bounds the l2 norm of the gradient in each step", gt=0)
    learning_rate_schedule: LearningRateSchedule = setting(
        "constant", "from round to round: constant, or cosine, which falls to zero after the last"
    )
    rounds: int | None = setting(None, "over which the learning rate falls")
    precision: Precision = setting(
        "float32", "that operators compute in; with bfloat16 weights and updates stay as they are"
    )

    def __post_init__(self) -> None:
        check(self)
        if self.learning_rate_schedule == "cosine" and (self.rounds is None or self.rounds < 1):
            raise ConfigError(
                "a cosine learning rate needs the number of rounds over which it falls: set rounds"
            )

    def learning_rate_in(self, round_index: int) -> float:
        """The learning rate of a round, counted from 0."""
        if self.learning_rate_schedule == "constant" or self.rounds is None:
            return self.learning_rate
        progress = min(round_index / self.rounds, 1.0)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))

    def optimizer_for(self, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """A fresh optimiser. Momentum is SGD's; Adam and AdamW have their usual betas (0.9, 0.999).

        Fused: one call for all parameters. Narrow models are small, and a step would spend up to a sixth of its
        time in calls for one tensor each.
        """
        decay = self.weight_decay
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, rate, self.momentum, weight_decay=decay, fused=True)
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, rate, weight_decay=decay, fused=True)
        return torch.optim.AdamW(parameters, rate, weight_decay=decay, fused=True)

    @property
    def stacks(self) -> bool:
        """Whether participants that train so can be trained at once, as one stacked model."""
        return self.precision == "float32"

    def batch_sizes(self, examples: int) -> list[int]:
        """The sizes of a round's mini-batches, for a participant that has so many examples."""
        full, last = epoch_sizes(examples, self.batch_size)
        epoch = [self.batch_size] * full + [last] * (last > 0)
        return (epoch * self.local_epochs)[: self.max_steps]


@dataclass(frozen=True)
class Training(TrainingSettings):
    """`TrainingSettings` for programs, with an optimiser and a learning rate of one's own.

    `make_optimizer` makes an optimiser of the parameters and a round's learning rate, anew in each round (None: the one
    that `optimizer` names). `schedule` gives from a round, counted from 0, and the number of all rounds what
    `learning_rate` is multiplied by (None: as `learning_rate_schedule` says).
    """

    make_optimizer: Callable[[list[nn.Parameter], float], torch.optim.Optimizer] | None = None
    schedule: Callable[[int, int], float] | None = None

    def learning_rate_in(self, round_index: int) -> float:
        """The learning rate of a round, counted from 0. Raises ConfigError where a schedule gives none."""
        if self.schedule is None:
            return super().learning_rate_in(round_index)
        factor = float(self.schedule(round_index, self.rounds or 1))
        if not 0 <= factor < math.inf:
            raise ConfigError(f"the factor of schedule is {factor}: it must be at least 0")
        return self.learning_rate * factor

    def optimizer_for(self, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """A fresh optimiser. Raises ConfigError where `make_optimizer` makes something else."""
        if self.make_optimizer is None:
            return super().optimizer_for(parameters, rate)
        made = self.make_optimizer(parameters, rate)
        if not isinstance(made, torch.optim.Optimizer):
            raise ConfigError(
                f"make_optimizer made a {type(made).__name__}: it must be a torch.optim.Optimizer"
            )
        return made

    @property
    def stacks(self) -> bool:
        """Not with an optimiser of one's own, which may look at whole tensors."""
        return super().stacks and self.make_optimizer is None


@dataclass(frozen=True)
class Trained:
    """What local training reports: mean loss, how many examples it saw (in each epoch anew), and steps."""

    loss: float
    examples_seen: int
    steps: int


def local_steps(
    model: nn.Module,
    data: Batch,
    settings: TrainingSettings,
    *,
    seed: int,
    round_index: int,
    participant: int,
    objective: Objective = cross_entropy,
) -> Trained:
    """Train a model in place on a participant's examples; `objective` is called once for each mini-batch.

    The result depends on the arguments alone: order of examples and dropout are drawn from (seed, round,
    participant), and torch's global generator is put back afterwards. Raises TrainingError where the loss is
    not finite or nothing can be trained, DataError where the participant has no examples.
    """
    batches = round_batches(data, settings, seed=seed, round_index=round_index, participant=participant)
    optimizer, objective = (
        build_optimizer(model, settings, round_index),
        in_precision(objective, settings.precision),
    )
    total, seen, steps = 0.0, 0, 0
    model.train()
    with torch.random.fork_rng(devices=sorted(_gpus(model))):
        torch.manual_seed(seed_of(seed, round_index, participant))
        for batch in batches:
            loss = gradient_step(model, batch, optimizer, settings.clip_norm, objective)
            steps += 1
            check_finite(loss, settings, round_index=round_index, participant=participant, step=steps)
            total, seen = total + loss * len(batch), seen + len(batch)
    optimizer.zero_grad(set_to_none=True)  # a cached sub-model need not keep its gradients between rounds
    return Trained(loss=total / seen, examples_seen=seen, steps=steps)


def in_precision(objective: Objective, precision: Precision) -> Objective:
    """The objective, computed in a precision: the forward pass, whose gradients then follow."""
    if precision == "float32":
        return objective

    def cast(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast(batch.targets.device.type, torch.bfloat16):
            return objective(model, batch)

    return cast


def round_batches(
    data: Batch, settings: TrainingSettings, *, seed: int, round_index: int, participant: int
) -> Iterator[Batch]:
    """All mini-batches of a participant's round, in the order that (seed, round, participant) draws.

    Raises DataError where it has no examples.
    """
    if len(data) == 0:
        raise DataError(f"participant {participant} has no examples: give it some or use fewer participants")
    generator = torch.Generator().manual_seed(seed_of(seed, round_index, participant))
    return islice(mini_batches(data, settings, generator), settings.max_steps)


def check_finite(
    loss: float, settings: TrainingSettings, *, round_index: int, participant: int, step: int
) -> None:
    """Raise TrainingError, naming the participant, where a loss is not finite. Steps count from 1."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"participant {participant}'s loss became {loss} in round {round_index + 1}, step {step}: "
            f"lower the learning rate (it is {settings.learning_rate_in(round_index):g})"
        )


def mini_batches(data: Batch, settings: TrainingSettings, generator: torch.Generator) -> Iterator[Batch]:
    """The mini-batches of a round: each epoch all examples in a new order, in the sizes of `epoch_sizes`."""
    full, last = epoch_sizes(len(data), settings.batch_size)
    for _ in range(settings.local_epochs):
        yield from islice(data.shuffled(settings.batch_size, generator), full + (last > 0))


def build_optimizer(model: nn.Module, settings: TrainingSettings, round_index: int) -> torch.optim.Optimizer:
    """A fresh optimiser for a round.

    Raises TrainingError where the model has no parameter that trains.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TrainingError("the model has no parameter that requires a gradient: nothing can be trained")
    return settings.optimizer_for(parameters, settings.learning_rate_in(round_index))


def _gpus(model: nn.Module) -> set[int]:
    """The GPUs that a model is on: their random generators are put back as well."""
    devices = {parameter.device for parameter in model.parameters()}
    return {device.index for device in devices if device.type == "cuda" and device.index is not None}


def epoch_sizes(examples: int, batch_size: int) -> tuple[int, int]:
    """How many full mini-batches an epoch has, and the size of the last, shorter one (0: there is none).

    A last mini-batch of a single example is left out where there are others: BatchNorm cannot normalise it.
    """
    full, rest = divmod(examples, batch_size)
    return full, rest if rest > 1 or rest == examples else 0
