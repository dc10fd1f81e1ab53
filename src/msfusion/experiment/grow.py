"""A run of Fed-Grow: participants with small models of their own learn together how to grow a large one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

from msfusion.costs import StepFlops
from msfusion.data.federated import FederatedData, example_inputs
from msfusion.data.load import load_data
from msfusion.data.loaded import LABELLED
from msfusion.errors import ConfigError, GrowthError
from msfusion.experiment.config import Config
from msfusion.experiment.fingerprint import model_digest
from msfusion.experiment.fitting import optimizer_states
from msfusion.experiment.local import LocalRun
from msfusion.experiment.setup import scoring_of, settle_process
from msfusion.federated.compression import compressed
from msfusion.federated.participation import Conditions, RoundSettings
from msfusion.federated.results import RoundResult
from msfusion.federated.states import state_of
from msfusion.imports import is_reference
from msfusion.methods.fedgrow.build import grow_method
from msfusion.methods.fedgrow.costs import GrowCosts, bytes_of, grow_costs, private_steps
from msfusion.methods.fedgrow.method import GrowMethod
from msfusion.methods.fedgrow.private import SmallModel
from msfusion.methods.fedgrow.settings import GrowSettings
from msfusion.models.build import build_model
from msfusion.models.spec import ModelSpec
from msfusion.objectives import require_classes, require_embeddings
from msfusion.seeds import seed_of
from msfusion.width.groups import State
from msfusion.width.trace import outline_of


class GrowRun(LocalRun):
    """What `Prepared` asks for. Raises MsfusionError for models that do not grow into each other."""

    method: GrowMethod

    def __init__(self, config: Config) -> None:
        settle_process()
        settings = config.grow_settings
        assert settings is not None  # which the configuration has checked
        self.settings: GrowSettings = settings
        data = load_data(config.data_spec)
        if data.task not in LABELLED:
            raise ConfigError(
                f"the targets of {data.name} are numbers, and fedgrow trains with cross-entropy: choose data with "
                "labels, or another method.name"
            )
        target = build_model(config.model_spec, data)
        data = data.for_model(target)
        require_embeddings(target, data.test.take(slice(0, 2)), data.vocabulary_size)
        require_classes(target, data.test.take(slice(0, 2)), data.by_holder)
        if config.evaluation.own_labels and data.task == "language_modelling":
            raise ConfigError("evaluation.own_labels needs labels, and running text has none: leave it out")
        people, absent = config.participants, config.participants.dropout or 0.0
        super().__init__(
            config,
            data,
            compressed(self._made(config, data, target), *config.codecs),
            RoundSettings(
                config.rounds, people.fraction, evaluate_every=config.evaluation.every, seed=config.seed
            ),
            Conditions(dropout=absent if isinstance(absent, tuple) else (absent,) * people.count),
        )
        self._private_steps: dict[int, tuple[StepFlops, StepFlops | None]] = {}

    @cached_property
    def model_digest(self) -> str:
        """Of each model that a function of the user's makes; the others are what their settings and folders say."""
        if not is_reference(self.config.model_spec.name):
            return model_digest(())
        method = self.method
        models = [method.target, method.intermediate, *(grower.small.model for grower in method.growers)]
        distinct = {id(model): model for model in models if model is not None}
        return model_digest(outline_of(model, example_inputs(self.data)) for model in distinct.values())

    def observer(self) -> _Observer:
        """How far the participants' models lie apart, and what they computed."""
        return _Observer(self)

    def figures(self) -> dict[str, Any]:
        """What each participant trains, computes, holds and sends in a round of growth, and what the target would ask.

        `private` has what its own stages cost in all, of which nothing travels.
        """
        costs, target = self._costs, self._costs.target
        rows = [
            {
                "participant": index,
                "examples": len(own),
                "parameters": costs.trainable,
                "share": 1 - costs.fewer_parameters,
                "flops_per_example": costs.flops_per_example,
                "peak_memory": costs.peak_memory,
                "bytes_down": costs.bytes_down,
                "bytes_up": costs.bytes_up,
                "small_parameters": self._small_parameters(index),
                "private_flops": self.private_flops[index],
            }
            for index, own in enumerate(self.data.participants)
        ]
        whole = {
            name: getattr(target, name)
            for name in ("parameters", "flops_per_example", "peak_memory", "bytes_down", "bytes_up")
        }
        return {"participants": rows, "full_model": {**whole, "share": 1.0}}

    def plan(self) -> dict[str, Any]:
        """`figures`, and how much less that is than FedAvg of the target.

        `fewer_bytes` is of the messages of training alone, `fewer_bytes_evaluated` of all that the metrics count: who
        has a model of its own is sent the operator once more in order to evaluate it.
        """
        costs, leaving = self._costs, self.settings.leaving
        return {
            "method": self.config.method.name,
            "rounds": self.config.rounds,
            "growth_rounds": self.settings.growth_rounds or self.config.rounds,
            "data": self.data.description,
            "leaves_participants": [*dict.fromkeys([*leaving(0), *leaving(self.config.rounds - 1)])],
            "fewer_parameters": costs.fewer_parameters,
            "fewer_bytes": costs.fewer_bytes,
            "fewer_bytes_evaluated": self._fewer_bytes_evaluated(),
            **self.figures(),
        }

    def _fewer_bytes_evaluated(self) -> float:
        """The share of FedAvg's bytes that need not travel in rounds of growth, evaluations included.

        A codec is for training alone: what is to be evaluated goes as it is.
        """
        costs, every = self._costs, self.config.evaluation.every
        trained = len(self.round_settings.participants_in(0, self.config.participants.count))
        asked = self.config.participants.count / every
        examined = asked if self.method.asks(self.method.after(0)) else 0.0
        others = asked if self.config.evaluation.own_labels else 0.0  # only then must FedAvg ask anybody
        examination = bytes_of(self.method.leaving(0))
        grown = trained * (costs.bytes_down + costs.bytes_up) + examined * examination
        whole = trained * (costs.target.bytes_down + costs.target.bytes_up) + others * costs.target.bytes_down
        return 1 - grown / whole

    def flops_in(self, round_index: int, participant: int) -> int:
        """Training FLOPs of a participant's round, private stages aside.

        Counted is what trains: a model that is made once, without a gradient, is left out, as evaluations are.
        """
        settings = self.settings.training_in(round_index)
        steps = self._costs.steps if self.settings.growing(round_index) else self._costs.target_steps
        return steps.of(settings.batch_sizes(len(self.data.participants[participant])))

    @cached_property
    def private_flops(self) -> tuple[int, ...]:
        """What each participant's own stages cost: the training of its small model, and the fit of its operator."""
        return tuple(self._private_flops(index) for index in range(len(self.data.participants)))

    def _private_flops(self, participant: int) -> int:
        if not self.method.growers:
            return 0
        data, own = self.data.participants[participant], self.method.growers[participant].small
        if id(own.model) not in self._private_steps:  # participants of one size share a model
            self._private_steps[id(own.model)] = private_steps(self.method, participant, data)
        small, operator = self._private_steps[id(own.model)]
        pretraining = 0 if own.trained else small.of(self.settings.pretraining.batch_sizes(len(data)))
        return pretraining + (
            0 if operator is None else operator.of(self.settings.fit.batch_sizes(len(data)))
        )

    def _small_parameters(self, participant: int) -> int | None:
        if not self.method.growers:
            return None
        return sum(each.numel() for each in self.method.growers[participant].small.model.parameters())

    @cached_property
    def _costs(self) -> GrowCosts:
        """Of a round of growth, or of the target without an operator; by a codec, what messages will have roughly."""
        training = self.config.training_settings
        costs = grow_costs(
            self.method,
            self.data.participants[0],
            batch_size=training.batch_size,
            states=optimizer_states(training),
        )
        small = self.method.compression
        if small is None:
            return costs
        saved_down, saved_up = small.saved(self.method.after(0))
        return replace(costs, bytes_down=costs.bytes_down - saved_down, bytes_up=costs.bytes_up - saved_up)

    def _made(self, config: Config, data: FederatedData, target: nn.Module) -> GrowMethod:
        """The method, with a model for each participant; equal small models share their working space."""
        section, spec = config.grow, config.model_spec
        assert section is not None
        built: dict[str, nn.Module] = {}
        smalls = []
        for participant in range(0 if section.growth == "scratch" else config.participants.count):
            wanted = section.small_of(participant)
            own = _spec(spec, wanted)
            if repr(own) not in built:
                built[repr(own)] = _built("grow.small", own, data)
            smalls.append(_small(built[repr(own)], own, data, seed_of(config.seed, participant)))
        middle = None
        if section.growth == "ligo" and section.intermediate is not None:
            middle = _built("grow.intermediate", _spec(spec, section.intermediate), data)
        return grow_method(
            target,
            smalls,
            self.settings,
            intermediate=middle,
            example_inputs=example_inputs(data),
            seed=config.seed,
            name=config.method.name,
            scoring=scoring_of(config, data),
            own_labels=config.evaluation.own_labels,
            weighting=config.method.weighting,
        )


def _built(key: str, spec: ModelSpec, data: FederatedData) -> nn.Module:
    """The model that stands under a key, from a folder only if it is whole: no participant trains that one first."""
    try:
        return build_model(spec, data)
    except GrowthError as error:
        raise GrowthError(
            f"{key}: {error}; a small model from a folder is not trained here, so it has to be whole and fit the data"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{key}, a model of its own: {error}") from error


def _small(model: nn.Module, spec: ModelSpec, data: FederatedData, seed: int) -> SmallModel:
    """A small model of the shape of `model`: that itself if it comes trained, else one with weights of its own."""
    if spec.weights == "whole":
        return SmallModel(model, state_of(model), trained=True)
    return SmallModel(model, state_of(build_model(replace(spec, seed=seed), data)))


def _spec(target: ModelSpec, wanted: Mapping[str, Any] | str) -> ModelSpec:
    """The specification of a model that differs from the target's in some options, or stands in a folder."""
    if isinstance(wanted, str):
        return replace(target, name=wanted, options={}, weights="whole")
    return replace(target, options={**target.options, **wanted}, weights="random")


class _Observer:
    """How far the participants' models lie apart in the test scores, and what everybody computed."""

    def __init__(self, run: GrowRun) -> None:
        self._run = run
        self._remembering: set[int] = set()

    def again(self, line: Mapping[str, Any]) -> None:
        """A round that was run before."""
        self._note(line["round"] - 1, line["participants"])

    def figures(self, result: RoundResult, before: State) -> dict[str, Any]:
        """Of a round that has ended."""
        present = [each.participant for each in result.participants]
        spent = sum(self._run.flops_in(result.round_index, each) for each in present)
        if self._run.method.personal(before):  # nothing common to grow from: it is remembered, or made now
            spent += sum(self._run.private_flops[each] for each in present if each not in self._remembering)
        self._note(result.round_index, present)
        figures: dict[str, Any] = {"training_flops": spent}
        apart, own, own_apart = result.spread, result.own_evaluation, result.own_spread
        if apart is not None:
            figures |= {"accuracy_sd": apart.accuracy, "loss_sd": apart.loss}
        if own is not None:
            figures |= {"own_accuracy": own.accuracy, "own_loss": own.loss}
        if own_apart is not None:
            figures |= {"own_accuracy_sd": own_apart.accuracy, "own_loss_sd": own_apart.loss}
        return figures

    def _note(self, round_index: int, participants: Sequence[int]) -> None:
        """Who has kept what its private stages made: then they do not run again."""
        if self._run.settings.kept(round_index):
            self._remembering.update(participants)
