"""From what participants' machines can bear to their width ratios.

Whatever trains slices, or one small model, needs the same in each round. A sum of blocks needs more than its training:
what a participant remembers, and in some rounds the blocks that were finished meanwhile. So ratios are found for
training alone, then it is foreseen what the run will ask of everybody. While that is beyond a budget, somebody holds
less: first whoever trains a single block, which then becomes smaller for all; then whoever trains several, fewer.
Whoever is stronger than the weakest, at last, trains as many blocks as it can bear: the costs of a slice grow with the
square of its width, and those of blocks with their number, so that there is room for more than the slice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from msfusion.batch import Batch
from msfusion.budgets import Budget, largest_that_keeps, needs_of, ratios_of, too_small
from msfusion.costs import Costs, costs_of, inference_flops
from msfusion.errors import ConfigError
from msfusion.experiment.besides import Besides, Block
from msfusion.experiment.config import Config
from msfusion.federated.compression import compressed_costs
from msfusion.federated.problem import METHODS, Settings
from msfusion.federated.states import payload_bytes
from msfusion.federated.training import TrainingSettings
from msfusion.methods.blocks import blocks_at_once
from msfusion.width.submodel import narrow
from msfusion.width.tensors import state_tensors
from msfusion.windows import static

if TYPE_CHECKING:
    from msfusion.experiment.forecast import Forecast
    from msfusion.experiment.setup import Parts, Setup

Budgets = tuple[Budget, ...]


def with_fitting_ratios(config: Config, parts: Parts, budgets: Budgets | None, *, scaling: bool) -> Config:
    """The configuration with each budget turned into the largest width ratio at which training keeps within it.

    With `scaling` they are those of slices of the large model: a slice scales its weights, and keeps the scaled ones
    for the backward pass, which is as much again. Without it they are those of small models, which scale nothing.
    Raises ConfigError, naming the participant, where not even the narrowest sub-model keeps within it.
    """
    if budgets is None or METHODS[config.method.name].holds_everything:
        return config
    widths = Widths(config, parts)
    every, found = [*ratios_of(parts.width_map), 1.0], dict[Budget, float]()
    for participant, budget in enumerate(budgets):
        if budget not in found:
            try:
                found[budget] = largest_that_keeps(every, partial(widths.exceeded, budget, scaling))
            except ConfigError as error:
                raise ConfigError(f"participants.budget of participant {participant}: {error}.") from error
    return _with_ratios(config, [found[budget] for budget in budgets])


def with_smaller_ratios(config: Config, parts: Parts, budgets: Budgets, setup: Setup) -> Config | None:
    """The configuration with smaller ratios than those of a run that asks for more than a budget allows; None where it
    keeps within all.

    Raises ConfigError, naming the participant, where there is nothing smaller.
    """
    forecast = setup.forecast
    over = [] if forecast is None else _over(budgets, forecast)
    if forecast is None or not over:
        return None
    ratios, method = [*setup.capacities.typical], forecast.method
    alone = [who for who in over if len(method.held(who, 0)) == 1]
    if alone:
        widths = Widths(config, parts)
        of_a_block = {who: _smaller_block(who, budgets[who], widths, forecast) for who in alone}
        smallest = min(of_a_block.values())  # of these are the blocks then, which may be all that others need
        ratios = [smallest if of_a_block.get(who) == smallest else ratio for who, ratio in enumerate(ratios)]
    else:
        for who in over:
            ratios[who] = _of_fewer_blocks(who, budgets[who], ratios_of(parts.width_map), forecast)
    return _with_ratios(config, ratios)


def _with_ratios(config: Config, ratios: Sequence[float]) -> Config:
    """Raises ConfigError where nobody has the minimum_ratio."""
    least = config.participants.minimum_ratio
    if least is not None and max(ratios) < least:
        raise ConfigError(
            f"participants.minimum_ratio is {least:g}, but no budget allows more than {max(ratios):g}."
        )
    return config.changed({"participants.ratio": list(ratios)})


def _over(budgets: Budgets, forecast: Forecast) -> list[int]:
    """Those of whom the run asks for more than their budget."""
    return [who for who, budget in enumerate(budgets) if budget.exceeded(forecast.needs(who)) is not None]


def _smaller_block(who: int, budget: Budget, widths: Widths, forecast: Forecast) -> float:
    """The largest ratio below the present one at which a participant can bear a block, with what comes besides.

    Raises ConfigError where there is none.
    """
    present, besides = forecast.method.capacities.smallest, forecast.besides(who)
    smaller = [ratio for ratio in ratios_of(widths.parts.width_map) if ratio < present]
    try:
        if not smaller:
            raise too_small(str(budget.exceeded(forecast.needs(who))))
        return largest_that_keeps(
            smaller, lambda ratio: budget.exceeded(widths.needs_of_block(ratio, besides))
        )
    except ConfigError as error:
        raise ConfigError(
            f"participants.budget of participant {who}: in a sum of {forecast.method.phases.blocks} blocks, {error}; "
            "or say method.blocks = 1."
        ) from error


def _of_fewer_blocks(who: int, budget: Budget, ratios: Sequence[float], forecast: Forecast) -> float:
    """The largest ratio at which a participant that trains too many blocks at once trains as many less as it must."""
    method = forecast.method
    count, smallest = len(method.held(who, 0)), method.capacities.smallest
    training, needs = needs_of(forecast.training(who)), needs_of(forecast.needs(who))
    limits = {name: getattr(budget, name) for name in needs}
    # a block less takes that much less at most, since what is not trained is sent and remembered
    less = max(
        math.ceil((needs[name] - limit) * count / training[name])
        for name, limit in limits.items()
        if limit is not None
    )
    fewer = max(1, count - less)
    return max(each for each in ratios if blocks_at_once(each, smallest, len(method.starts)) <= fewer)


def with_more_blocks(config: Config, budgets: Budgets, setup: Setup) -> Config | None:
    """The configuration with larger ratios, at which those who have room train more blocks at once; None where nobody
    has, or all are alike.
    """
    forecast = setup.forecast
    if forecast is None or setup.capacities.alike:
        return None
    before, smallest = [*setup.capacities.typical], setup.capacities.smallest
    ratios = [
        # blocks are as wide as the smallest ratio says, so who has that keeps it
        ratio if ratio == smallest else max(ratio, _of_most_blocks(who, budgets[who], forecast))
        for who, ratio in enumerate(before)
    ]
    return None if ratios == before else _with_ratios(config, ratios)


def _of_most_blocks(who: int, budget: Budget, forecast: Forecast) -> float:
    """The ratio at which a participant trains as many blocks at once as its budget has room for."""
    method = forecast.method
    smallest, count = method.capacities.smallest, len(method.held(who, 0))
    counts = range(count, blocks_at_once(1.0, smallest, len(method.starts)) + 1)
    most = largest_that_keeps(counts, lambda blocks: budget.exceeded(forecast.needs_with(who, int(blocks))))
    return forecast.ratio_of(int(most))


def keeps(budgets: Budgets, setup: Setup) -> bool:
    """Whether the run asks of nobody for more than its budget."""
    return setup.forecast is None or not _over(budgets, setup.forecast)


def within_memory(settings: Settings, budgets: Budgets | None) -> Settings:
    """The settings of a method for the smallest memory that a budget allows."""
    limits = [each.memory for each in budgets or () if each.memory is not None]
    return settings.within_memory(min(limits)) if limits else settings


@dataclass
class Widths:
    """What a model costs at each width, as sub-model or as block. `Parts` remember it, for a comparison asks often."""

    config: Config
    parts: Parts
    _known: dict[tuple[float, bool], tuple[Costs, Block]] = field(init=False)

    def __post_init__(self) -> None:
        method, settings = self.config.method, self.config.training_settings
        of_a_step = (optimizer_states(settings), settings.batch_size)
        of_messages = (method.codec, method.codec_down, method.secure, self.config.participants.count)
        key = str((of_a_step, of_messages))
        self._known = self.parts.fitting.setdefault(key, {})

    def exceeded(self, budget: Budget, scaling: bool, ratio: float) -> str | None:
        """The first limit that training a sub-model does not keep."""
        return budget.exceeded(self._of(ratio, scaling=scaling)[0])

    def needs_of_block(self, ratio: float, besides: Besides) -> Costs:
        """What training a block costs with what comes besides, of blocks as wide."""
        return besides.added_to(*self._of(ratio, scaling=False))

    def _of(self, ratio: float, *, scaling: bool) -> tuple[Costs, Block]:
        if (ratio, scaling) not in self._known:
            parts, example = self.parts, self.parts.data.participants[0]
            window = static(parts.width_map, 0, 0, ratio, participants=1)
            module = parts.model if ratio == 1 else narrow(parts.model, parts.width_map, window, scaling)
            costs = message_costs(self.config, module, example)
            trained = with_secure_sums(self.config, module, costs)
            self._known[ratio, scaling] = (trained, block_of(module, costs, example))
        return self._known[ratio, scaling]


def block_of(module: nn.Module, costs: Costs, example: Batch) -> Block:
    """What a module takes as a block that is not trained, where it is sent as its `costs` say."""
    tensors = {str(id(tensor)): tensor for tensor in state_tensors(module).values()}
    return Block(costs.bytes_down, payload_bytes(tensors), inference_flops(module, example))


def message_costs(config: Config, module: nn.Module, example: Batch) -> Costs:
    """What training a module in a round costs, its messages as they travel. Raises MsfusionError."""
    return compressed_costs(module, training_costs(module, example, config.training_settings), *config.codecs)


def with_secure_sums(config: Config, module: nn.Module, costs: Costs) -> Costs:
    """The costs with what secure sums add to a round's messages."""
    secure = config.secure_sums
    return costs if secure is None else secure.costs(module, costs, config.participants.count)


def training_costs(module: nn.Module, batch: Batch, settings: TrainingSettings) -> Costs:
    """What training a module on examples like these costs. Raises MsfusionError."""
    return costs_of(
        module,
        batch,
        optimizer_states_per_parameter=optimizer_states(settings),
        batch_size=settings.batch_size,
    )


def optimizer_states(settings: TrainingSettings) -> int:
    """How many numbers the optimiser keeps for each parameter."""
    return {"sgd": 1 if settings.momentum else 0}.get(settings.optimizer, 2)
