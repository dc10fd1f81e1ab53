"""A run of Fed-Grow: participants with small models of their own learn together how to grow a large one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from msfusion.config import Config
from msfusion.costs import Costs
from msfusion.data.federated import FederatedData, example_inputs
from msfusion.data.load import load_data
from msfusion.engines.calendar import Calendar, Conditions, RoundSettings
from msfusion.engines.local import run_rounds
from msfusion.engines.results import ParticipantResult, RoundResult
from msfusion.engines.workers import check_execution
from msfusion.methods.grow import GrowMethod
from msfusion.methods.grow_build import grow_method
from msfusion.methods.grow_costs import GrowCosts, grow_costs, private_costs
from msfusion.methods.grow_private import SmallModel
from msfusion.methods.grow_settings import GrowSettings
from msfusion.methods.memory import Memories
from msfusion.methods.states import state_of
from msfusion.methods.training import seed_of
from msfusion.models.build import build_model
from msfusion.models.spec import ModelSpec
from msfusion.runs.setup import optimizer_states, settle_process
from msfusion.width.groups import State


class GrowRun:
    """What `Prepared` asks for. Raises MsfusionError for models that do not grow into each other."""

    def __init__(self, config: Config) -> None:
        settle_process()
        self.config = config
        settings = config.grow_settings
        assert settings is not None  # which the configuration has checked
        self.settings: GrowSettings = settings
        self.data: FederatedData = load_data(config.data_spec)
        target = build_model(config.model_spec, self.data)
        self.data = self.data.for_model(target)
        self.method: GrowMethod = self._method(target)
        self._private_costs: dict[int, tuple[Costs, Costs | None]] = {}
        check_execution(self.method, config.run.workers, config.run.together, config.run.device)
        people = config.participants
        self.round_settings = RoundSettings(
            config.rounds, people.fraction, evaluate_every=config.evaluation.every, seed=config.seed
        )
        absent = people.dropout or 0.0
        self.conditions = Conditions(
            dropout=absent if isinstance(absent, tuple) else (absent,) * people.count
        )

    @property
    def calendar(self) -> Calendar:
        """Who takes part in each round."""
        return Calendar(self.round_settings, self.config.participants.count, self.conditions)

    def initial_state(self) -> dict[str, Tensor]:
        """What participants have in common before the first round."""
        return self.method.initial_state()

    def rounds(
        self,
        state: State,
        memories: Memories,
        first_round: int,
        on_participant: Callable[[ParticipantResult], None],
    ) -> Generator[RoundResult, None, None]:
        """The rounds from `first_round` on."""
        settings = self.config.run
        return run_rounds(
            self.method,
            self.data.participants,
            self.round_settings,
            state=state,
            memories=memories,
            first_round=first_round,
            workers=settings.workers,
            threads=settings.threads,
            device=settings.device,
            test=self.data.test,
            conditions=self.conditions,
            on_participant=on_participant,
        )

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
        """`figures`, and how much less that is than FedAvg of the target."""
        costs = self._costs
        return {
            "method": self.config.method.name,
            "rounds": self.config.rounds,
            "growth_rounds": self.settings.growth_rounds or self.config.rounds,
            "data": self.data.description,
            "leaves_participants": [*self.settings.leaving(0)],
            "fewer_parameters": costs.fewer_parameters,
            "fewer_bytes": costs.fewer_bytes,
            **self.figures(),
        }

    def flops_in(self, round_index: int, participant: int) -> int:
        """Training FLOPs of a participant's round, private stages aside."""
        settings, _ = self.settings.training_in(round_index)
        growing = self.settings.growing(round_index)
        costs = self._costs.flops_per_example if growing else self._costs.target.flops_per_example
        return sum(settings.batch_sizes(len(self.data.participants[participant]))) * costs

    @cached_property
    def private_flops(self) -> tuple[int, ...]:
        """What each participant's own stages cost: the training of its small model, and the fit of its operator."""
        return tuple(self._private_flops(index) for index in range(len(self.data.participants)))

    def _private_flops(self, participant: int) -> int:
        if not self.method.growers:
            return 0
        data, own = self.data.participants[participant], self.method.growers[participant].small
        if id(own.model) not in self._private_costs:  # participants of one size share a model
            self._private_costs[id(own.model)] = private_costs(self.method, participant, data)
        small, operator = self._private_costs[id(own.model)]
        seen = 0 if own.trained else sum(self.settings.pretraining.batch_sizes(len(data)))
        fitted = self.settings.fit.steps * min(self.settings.fit.batch_size, len(data))
        return seen * small.flops_per_example + (
            0 if operator is None else fitted * operator.flops_per_example
        )

    def _small_parameters(self, participant: int) -> int | None:
        if not self.method.growers:
            return None
        return sum(each.numel() for each in self.method.growers[participant].small.model.parameters())

    @cached_property
    def _costs(self) -> GrowCosts:
        training = self.config.training_settings
        return grow_costs(
            self.method,
            self.data.participants[0],
            batch_size=training.batch_size,
            states=optimizer_states(training),
        )

    def _method(self, target: nn.Module) -> GrowMethod:
        """The method, with a model for each participant; equal small models share their working space."""
        config, section, spec = self.config, self.config.grow, self.config.model_spec
        assert section is not None
        built: dict[str, nn.Module] = {}
        smalls = []
        for participant in range(0 if section.growth == "scratch" else config.participants.count):
            wanted = section.small_of(participant)
            own = self._spec(spec, wanted)
            if repr(own) not in built:
                built[repr(own)] = build_model(own, self.data)
            smalls.append(self._small(built[repr(own)], own, participant))
        intermediate = section.intermediate if section.growth == "ligo" else None
        return grow_method(
            target,
            smalls,
            self.settings,
            intermediate=None
            if intermediate is None
            else build_model(self._spec(spec, intermediate), self.data),
            example_inputs=example_inputs(self.data),
            seed=config.seed,
            name=config.method.name,
            language_modelling=self.data.task == "language_modelling",
            evaluation_batch_size=config.evaluation.batch_size,
        )

    def _small(self, model: nn.Module, spec: ModelSpec, participant: int) -> SmallModel:
        if spec.weights == "pretrained":
            return SmallModel(model, state_of(model), trained=True)
        own = replace(spec, seed=seed_of(self.config.seed, participant))  # its weights are its own
        return SmallModel(model, state_of(build_model(own, self.data)))

    @staticmethod
    def _spec(target: ModelSpec, wanted: Mapping[str, Any] | str) -> ModelSpec:
        """The specification of a model that differs from the target's in some options, or stands in a folder."""
        if isinstance(wanted, str):
            return replace(target, name=wanted, options={}, weights="pretrained")
        return replace(target, options={**target.options, **wanted}, weights="random")


class _Observer:
    """How far the participants' models lie apart in the test scores, and what everybody computed."""

    def __init__(self, run: GrowRun) -> None:
        self._run = run
        self._begun: set[int] = set()

    def again(self, line: Mapping[str, Any]) -> None:
        """A round that was run before."""
        self._begun.update(line["participants"])

    def figures(self, result: RoundResult, before: State) -> dict[str, Any]:
        """Of a round that has ended."""
        present = [each.participant for each in result.participants]
        spent = sum(self._run.flops_in(result.round_index, each) for each in present)
        spent += sum(self._run.private_flops[each] for each in present if each not in self._begun)
        self._begun.update(present)
        figures: dict[str, Any] = {"training_flops": spent}
        if result.spread is not None:
            figures |= {"accuracy_sd": result.spread.accuracy, "loss_sd": result.spread.loss}
        return figures
