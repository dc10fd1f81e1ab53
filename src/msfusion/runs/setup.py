"""From a configuration to everything that a run needs: data, model, width map, method."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import nn

from msfusion.budgets import Budget, largest_ratio
from msfusion.config import Config
from msfusion.costs import Costs, costs_of
from msfusion.data.federated import FederatedData, example_inputs
from msfusion.data.load import load_data
from msfusion.engines.local import RoundSettings
from msfusion.errors import ConfigError
from msfusion.methods.adaptive import AdaptiveMethod
from msfusion.methods.narrow import NarrowMethod
from msfusion.methods.small import SmallMethod
from msfusion.methods.table import AnyMethod, build_method
from msfusion.methods.training import TrainingSettings
from msfusion.models.build import build_model
from msfusion.objectives import evaluate
from msfusion.width.groups import WidthMap, Window
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace
from msfusion.windows import Overlap, even_overlap, static


@dataclass(frozen=True)
class Setup:
    """What a configuration stands for. `data` has its inputs as the model takes them."""

    config: Config
    data: FederatedData
    model: nn.Module
    width_map: WidthMap
    method: AnyMethod
    rounds: RoundSettings

    @property
    def language_modelling(self) -> bool:
        """Whether results are told as perplexity."""
        return self.data.task == "language_modelling"

    def window(self, round_index: int, participant: int, overlap: float | None = None) -> Window:
        """The units of the full model that a participant holds in a round.

        `overlap` is that of the round where feedback sets it; by default the first.
        """
        if isinstance(self.method, AdaptiveMethod):
            known = self.method.first_overlap if overlap is None else overlap
            return self.method.at(known).window(round_index, participant)
        if isinstance(self.method, NarrowMethod):
            return self.method.window(round_index, participant)
        ratios = self.config.participants.ratios  # the small model: what the smallest participant can hold
        return static(self.width_map, participant, round_index, min(ratios), participants=len(ratios))

    def overlap(self, round_index: int) -> float | None:
        """The share of its window that a participant has in common with its neighbour; msfusion's alone.

        Where feedback sets it, that of the first round.
        """
        if isinstance(self.method, AdaptiveMethod):
            return self.method.first_overlap
        if self.config.method.name != "msfusion":
            return None
        ratios, overlap = self.config.participants.ratios, self.config.overlap
        return overlap.applied(round_index, ratios) if isinstance(overlap, Overlap) else even_overlap(ratios)

    def participant_model(self, participant: int) -> nn.Module:
        """What a participant holds and trains (in round 0; in other rounds one of the same shapes)."""
        if isinstance(self.method, SmallMethod):
            return self.method.model
        window = self.window(0, participant)
        if all(len(window[group.name]) == group.units for group in self.width_map.groups):
            return self.model
        return narrow(self.model, self.width_map, window)

    def present(self) -> list[tuple[int, ...]]:
        """Who takes part in each round."""
        count = self.config.participants.count
        return [self.rounds.participants_in(index, count) for index in range(self.config.rounds)]


@dataclass(frozen=True)
class Parts:
    """What does not depend on the method: the data as the model takes it, the model, its width map."""

    data: FederatedData
    model: nn.Module
    width_map: WidthMap


def prepare(config: Config, parts: Parts | None = None) -> Setup:
    """Load the data, build and trace the model (unless given), and build the method. Raises MsfusionError."""
    parts = parts or prepare_parts(config)
    data, model, width_map = parts.data, parts.model, parts.width_map
    config = with_fitting_ratios(config, parts)
    method = build_method(
        config.method.name,
        model,
        width_map,
        config.participants.ratios,
        config.training_settings,
        seed=config.seed,
        weighting=config.method.weighting,
        language_modelling=data.task == "language_modelling",
        evaluation_batch_size=config.evaluation.batch_size,
        overlap=config.overlap,
        contrastive=config.method.contrastive,
        between_rounds=config.method.between_rounds,
    )
    rounds = RoundSettings(
        rounds=config.rounds,
        fraction=config.participants.fraction,
        evaluate_every=config.evaluation.every,
        seed=config.seed,
    )
    return Setup(config, data, model, width_map, method, rounds)


def with_fitting_ratios(config: Config, parts: Parts) -> Config:
    """The configuration with each budget turned into the largest width ratio that keeps within it.

    Raises ConfigError, naming the participant, where not even the narrowest sub-model does.
    """
    budgets = config.participants.budgets
    if budgets is None or config.method.name == "fedavg":  # which everybody trains whole, whatever it costs
        return config
    known: dict[Budget, float] = {}
    for participant, budget in enumerate(budgets):
        if budget in known:
            continue
        try:
            known[budget] = largest_ratio(
                parts.model,
                parts.width_map,
                budget,
                lambda module: training_costs(module, parts.data, config.training_settings),
            )
        except ConfigError as error:
            raise ConfigError(f"participants.budget of participant {participant}: {error}.") from error
    return config.changed({"participants.ratio": [known[budget] for budget in budgets]})


def training_costs(module: nn.Module, data: FederatedData, settings: TrainingSettings) -> Costs:
    """What training a module on this data costs a participant. Raises MsfusionError."""
    states = {"sgd": 1 if settings.momentum else 0}.get(settings.optimizer, 2)
    return costs_of(
        module,
        data.participants[0],
        optimizer_states_per_parameter=states,
        batch_size=settings.batch_size,
    )


def prepare_parts(config: Config) -> Parts:
    """Load the data, build the model and trace it. Raises MsfusionError."""
    settle_process()
    data = load_data(config.data_spec)
    model = build_model(config.model_spec, data)
    data = data.for_model(model)
    # A model whose output cannot be learnt from is refused here, before there is a run directory.
    evaluate(model, data.test.take(slice(0, 2)))
    return Parts(data, model, trace(model, example_inputs(data)))


def settle_process() -> None:
    """Make PyTorch in this process fit for what follows; call it before anything is computed."""
    # A process that has used several OpenMP threads cannot fork its workers.
    torch.set_num_threads(1)
    # torch.export warns of every axis of size one that it is one.
    logging.getLogger("torch._export.non_strict_utils").setLevel(logging.ERROR)
