"""From a configuration to everything that a run needs: data, model, width map, method."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn

from msfusion.costs import Costs
from msfusion.data.federated import FederatedData, example_inputs
from msfusion.data.load import load_data
from msfusion.data.loaded import LABELLED
from msfusion.errors import ConfigError
from msfusion.experiment.besides import Block
from msfusion.experiment.config import Config
from msfusion.experiment.config.targets import CROSS_ENTROPY, loss_name, refuse_without_scale
from msfusion.experiment.fitting import (
    Budgets,
    keeps,
    message_costs,
    training_costs,
    with_fitting_ratios,
    with_more_blocks,
    with_secure_sums,
    with_smaller_ratios,
    within_memory,
)
from msfusion.experiment.forecast import Forecast
from msfusion.federated.capacities import Capacities
from msfusion.federated.compression import compressed
from msfusion.federated.method import Method
from msfusion.federated.participation import Calendar, Conditions, RoundSettings
from msfusion.federated.problem import Problem
from msfusion.federated.protected import check_protected_rounds, protected
from msfusion.imports import failing_as
from msfusion.methods.blocks import BlocksMethod
from msfusion.models.build import build_model
from msfusion.network import Machine, machines_of
from msfusion.objectives import name_of_logits, require_classes, require_embeddings
from msfusion.quoting import quoted
from msfusion.scoring import LOSSES, Scoring, loss_named, metrics_named
from msfusion.width.groups import WidthMap, Window
from msfusion.width.trace import trace
from msfusion.windows import Feedback, static


@dataclass(frozen=True)
class Setup:
    """What a configuration stands for. `data` has its inputs as the model takes them.

    `config` says how msfusion starts; where that was left open, `why_start` says in words what was chosen, and why.
    """

    config: Config
    data: FederatedData
    model: nn.Module
    width_map: WidthMap
    method: Method
    rounds: RoundSettings
    why_start: str | None = None
    _costs: dict[float, tuple[Costs, Costs]] = field(default_factory=dict, repr=False)

    @property
    def language_modelling(self) -> bool:
        """Whether results are told as perplexity."""
        return self.data.task == "language_modelling"

    def window(self, round_index: int, participant: int, overlap: float | None = None) -> Window:
        """The units of the full model that a participant holds in a round.

        `overlap` is that of the round where feedback sets it; by default the first. A method without windows, such as
        `small`, trains what everybody can hold in every round.
        """
        window = self.method.with_overlap(overlap).window(round_index, participant)
        if window is not None:
            return window
        return static(self.width_map, 0, round_index, self.capacities.smallest, participants=1)

    @property
    def covers(self) -> bool:
        """Whether participants hold windows of the full model, whose entries they reach one after the other."""
        return not self.method.trains_own_models and self.method.window(0, 0) is not None

    @cached_property
    def capacities(self) -> Capacities:
        """The width ratio of each participant in each round."""
        return self.config.capacities

    def costs(self, ratio: float) -> Costs:
        """What training at a width ratio costs in a round. Raises MsfusionError."""
        return self._costs_at(ratio)[1]

    def costs_without_sums(self, ratio: float) -> Costs:
        """The same without what secure sums add to a round's messages. Raises MsfusionError."""
        return self._costs_at(ratio)[0]

    def _costs_at(self, ratio: float) -> tuple[Costs, Costs]:
        if ratio not in self._costs:
            model = self.method.trained_at(ratio)
            costs = message_costs(self.config, model, self.data.participants[0])
            self._costs[ratio] = (costs, with_secure_sums(self.config, model, costs))
        return self._costs[ratio]

    @cached_property
    def full_costs(self) -> Costs:
        """What training the full model would cost. Raises MsfusionError."""
        return training_costs(self.model, self.data.participants[0], self.config.training_settings)

    def flops(self, participant: int, ratio: float) -> int:
        """The training FLOPs of a participant's round. Raises MsfusionError."""
        return self.examples_seen(participant) * self.costs(ratio).flops_per_example

    def examples_seen(self, participant: int) -> int:
        """How many examples a participant trains on in a round, one that it sees twice counted twice."""
        return self._examples_seen[participant]

    @cached_property
    def _examples_seen(self) -> tuple[int, ...]:
        settings = self.config.training_settings
        return tuple(sum(settings.batch_sizes(len(own))) for own in self.data.participants)

    @cached_property
    def machines(self) -> tuple[Machine, ...] | None:
        """Each participant's machine and link; None without a network."""
        network = self.config.network
        if network is None:
            return None
        return machines_of(network.kinds(self.config.participants.count), self.config.seed)

    def simulated_seconds(self, participant: int, round_index: int) -> float:
        """How long a participant's round takes on the simulated clock; there must be a network."""
        assert self.machines is not None
        machine = self.machines[participant]
        if self.forecast is not None:
            spent = self.forecast.spent(participant, round_index)
            return machine.seconds(spent.bytes_down, spent.flops, spent.bytes_up)
        ratio = self.capacities.ratio(participant, round_index)
        costs, flops = self.costs(ratio), self.flops(participant, ratio)
        return machine.seconds(costs.bytes_down, flops, costs.bytes_up)

    @cached_property
    def forecast(self) -> Forecast | None:
        """What each round asks of a participant, where that changes from round to round."""
        return Forecast(self, self.method) if isinstance(self.method, BlocksMethod) else None

    @cached_property
    def calendar(self) -> Calendar:
        """Who takes part in each round, and when each is done."""
        return Calendar(self.rounds, self.config.participants.count, self.conditions)

    @cached_property
    def conditions(self) -> Conditions:
        """What decides who takes part: ratios, absence, predicted times and the deadline."""
        people, network, machines = self.config.participants, self.config.network, self.machines
        dropout, least = people.dropout, people.minimum_ratio
        if dropout is None:
            dropout = 0.0 if machines is None else tuple(machine.dropout for machine in machines)
        conditions = Conditions(
            qualifies=None if least is None else lambda each, at: self.capacities.ratio(each, at) >= least,
            dropout=dropout if isinstance(dropout, tuple) else (dropout,) * people.count,
        )
        if network is not None:
            conditions = replace(
                conditions,
                seconds=self.simulated_seconds,
                deadline=network.deadline,
                late=network.late,
                late_weight=network.late_weight,
            )
        return conditions


@dataclass(frozen=True)
class Parts:
    """What does not depend on the method: the data as the model takes it, the model, its width map."""

    data: FederatedData
    model: nn.Module
    width_map: WidthMap
    fitting: dict[str, dict[tuple[float, bool], tuple[Costs, Block]]] = field(
        default_factory=dict, repr=False
    )
    """The costs of widths that budgets were held against (`fitting.Widths`), so that a comparison asks once."""


def prepare(config: Config, parts: Parts | None = None) -> Setup:
    """Load the data, build and trace the model (unless given), and build a method of sub-models.

    Raises MsfusionError.
    """
    parts = parts or prepare_parts(config)
    budgets = config.participants.budgets
    setup = _fitted(config, parts, budgets)
    if budgets is None:
        return setup
    while (less := with_smaller_ratios(config, parts, budgets, setup)) is not None:
        setup = _prepared(less, parts, budgets)
    more = with_more_blocks(config, budgets, setup)
    larger = setup if more is None else _prepared(more, parts, budgets)
    # blocks that some train are sent to the others, whose budgets may be too small for that
    return larger if keeps(budgets, larger) else setup


def _fitted(config: Config, parts: Parts, budgets: Budgets | None) -> Setup:
    """The run at the largest ratios at which training keeps within budgets. Raises MsfusionError.

    Small models have room for more width than slices. Which of them an open start comes to is known at some ratios
    only, so these are those of small models first, unless it is known that there will be none.
    """
    settings = config.method_settings
    assert settings is not None, "the others are made by `prepare`"
    if settings.own_models is not False:
        setup = _prepared(with_fitting_ratios(config, parts, budgets, scaling=False), parts, budgets)
        if budgets is None or setup.method.trains_own_models:
            return setup
    return _prepared(with_fitting_ratios(config, parts, budgets, scaling=True), parts, budgets)


def _prepared(config: Config, parts: Parts, budgets: Budgets | None) -> Setup:
    """The run at these ratios. Raises MsfusionError."""
    data = parts.data
    stale = config.network is not None and config.network.late == "downweight"
    if stale and isinstance(config.overlap, Feedback):
        raise ConfigError(
            "an update that is merged in a later round was cut under another overlap, where the overlap "
            "follows feedback: choose network.late = 'drop' or another shape of method.overlap."
        )
    settings = config.method_settings
    assert settings is not None, "the others are made by `prepare`"
    chosen = within_memory(settings, budgets).chosen(problem_of(config, parts))
    config = config.with_method(chosen.settings)
    rounds = RoundSettings(
        rounds=config.rounds,
        fraction=config.participants.fraction,
        evaluate_every=config.evaluation.every,
        seed=config.seed,
    )
    asked = len(rounds.participants_in(0, len(data.participants)))
    method = protected(compressed(chosen.method, *config.codecs), config.secure_sums, config.privacy, asked)
    setup = Setup(config, data, parts.model, parts.width_map, method, rounds, chosen.why)
    check_protected_rounds(method, rounds, len(data.participants), setup.conditions, config.screening)
    return setup


def problem_of(config: Config, parts: Parts) -> Problem:
    """What the method of a configuration is applied to."""
    people = parts.data.participants
    return Problem(
        parts.model,
        parts.data.test.take(slice(0, 2)),
        config.capacities,
        (config.training_settings,) * len(people),
        tuple(map(len, people)),
        config.rounds,
        config.seed,
        scoring_of(config, parts.data),
        parts.width_map,
    )


def scoring_of(config: Config, data: FederatedData) -> Scoring:
    """How a model's outputs are scored.

    Raises ConfigError for a loss that there is not, or does not fit the data, and for a trained model of another scale.
    """
    refuse_without_scale(config.model_spec, data)
    name = loss_name(config.training, data)
    labels = data.task in LABELLED
    if not labels and name == CROSS_ENTROPY:
        raise ConfigError(
            f"the targets of {data.name} are no labels, which cross-entropy needs: set training.loss to one of "
            f"{', '.join(LOSSES)}, or to module:function."
        )
    return Scoring(
        loss_named(name),
        metrics_named(config.evaluation.metrics, data.classes, not data.test.targets.is_floating_point()),
        data.task == "language_modelling",
        config.evaluation.batch_size,
        labels,
        None if data.preprocessing is None else data.preprocessing.targets,
    )


def is_scored_by_classes(config: Config, data: FederatedData) -> bool:
    """Whether the loss is cross-entropy over classes or tokens, so that a model must have logits of them."""
    return data.task in LABELLED and config.training.loss == CROSS_ENTROPY


def prepare_parts(config: Config) -> Parts:
    """Load the data, build the model and trace it. Raises MsfusionError."""
    settle_process()
    data = load_data(config.data_spec)
    model = build_model(config.model_spec, data)
    data = data.for_model(model)
    # A model whose output cannot be learnt from is refused here, before there is a run directory.
    shown = data.test.take(slice(0, 2))
    scored = is_scored_by_classes(config, data)
    called = f"model.name = {quoted(config.model_spec.name)}, called with two examples of {data.description},"
    with failing_as(ConfigError, called):
        require_embeddings(model, shown, data.vocabulary_size)
        if scored:
            require_classes(model, shown, data.by_holder)
    return Parts(data, model, traced(model, data, scored))


def traced(model: nn.Module, data: FederatedData, by_classes: bool = True) -> WidthMap:
    """The width map of a model for data as it takes them; of its outputs only what is learnt from counts.

    That is the logits, where it has such; with a loss of one's own, all of them. Raises UntraceableModelError.
    """
    outputs = name_of_logits(model, data.test.take(slice(0, 2))) if by_classes else None
    return trace(model, example_inputs(data), outputs=outputs)


def settle_process() -> None:
    """Make PyTorch in this process fit for what follows; call it before anything is computed."""
    # A process that has used several OpenMP threads cannot fork its workers.
    torch.set_num_threads(1)
    # torch.export warns of every axis of size one that it is one.
    logging.getLogger("torch._export.non_strict_utils").setLevel(logging.ERROR)
