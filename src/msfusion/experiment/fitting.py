"""From what participants' machines can bear to their width ratios.

Whatever trains slices, or one small model, needs the same in each round. A sum of blocks needs more than its training:
what a participant remembers, and in some rounds the blocks that were finished meanwhile. So ratios are found for
training alone, then it is foreseen what the run will ask of everybody. While that is beyond a budget, less is left for
training, and ratios are found anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from msfusion.batch import Batch
from msfusion.budgets import Budget, largest_ratio
from msfusion.costs import Costs, costs_of
from msfusion.errors import ConfigError
from msfusion.experiment.config import Config
from msfusion.federated.problem import METHODS, Settings
from msfusion.federated.training import TrainingSettings

if TYPE_CHECKING:
    from msfusion.experiment.setup import Parts, Setup

Budgets = tuple[Budget, ...]

STEP = 0.99
"""At least so much smaller is a budget that is tried next."""


def with_fitting_ratios(config: Config, parts: Parts, budgets: Budgets | None) -> Config:
    """The configuration with each budget turned into the largest width ratio at which training keeps within it.

    Raises ConfigError, naming the participant, where not even the narrowest sub-model does.
    """
    if budgets is None or METHODS[config.method.name].holds_everything:
        return config
    settings, known = config.training_settings, parts.fitting
    for participant, budget in enumerate(budgets):
        if (budget, settings) in known:
            continue
        try:
            known[budget, settings] = largest_ratio(
                parts.model,
                parts.width_map,
                budget,
                lambda module: training_costs(module, parts.data.participants[0], settings),
            )
        except ConfigError as error:
            asked = config.participants.budgets
            of_less = asked is None or budget != asked[participant]
            why = (
                f"beside what a sum of blocks takes, {error}; or say method.blocks = 1"
                if of_less
                else str(error)
            )
            raise ConfigError(f"participants.budget of participant {participant}: {why}.") from error
    ratios, least = [known[budget, settings] for budget in budgets], config.participants.minimum_ratio
    if least is not None and max(ratios) < least:
        raise ConfigError(
            f"participants.minimum_ratio is {least:g}, but no budget allows more than {max(ratios):g}."
        )
    return config.changed({"participants.ratio": ratios})


def within_memory(settings: Settings, budgets: Budgets | None) -> Settings:
    """The settings of a method for the smallest memory that a budget allows."""
    limits = [each.memory for each in budgets or () if each.memory is not None]
    return settings.within_memory(min(limits)) if limits else settings


def tightened(asked: Budgets, training: Budgets, setup: Setup) -> Budgets:
    """Budgets for training alone, less than these where the whole run asks for more than a participant was to bear.

    Raises ConfigError, naming the participant, where nothing is left.
    """
    if setup.forecast is None:
        return training
    pairs = enumerate(zip(asked, training, strict=True))
    return tuple(_less(who, most, now, setup.forecast.needs(who)) for who, (most, now) in pairs)


def _less(who: int, most: Budget, now: Budget, needs: Mapping[str, tuple[int, int]]) -> Budget:
    """A participant's budget for training alone; `needs` are what that takes, and what the whole run does."""
    changes: dict[str, Any] = {}
    for name, (of_training, in_all) in needs.items():
        limit, present = getattr(most, name), getattr(now, name)
        if limit is None or in_all <= limit:
            continue
        # what is remembered stays as it is at another ratio; what is sent and computed shrinks with it
        left = of_training - (in_all - limit) if name == "memory" else of_training * limit / in_all
        changes[name] = int(min(STEP * present, left))
        if changes[name] < 1:
            raise ConfigError(
                f"participants.budget of participant {who}: {name} is {limit:,.0f}, and a sum of blocks needs "
                f"{in_all:,.0f}: give a larger budget, or say method.blocks = 1."
            )
    return replace(now, **changes)


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
