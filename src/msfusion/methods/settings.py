"""The methods of the house by name: what a user chooses of each, and how it is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from msfusion.averaging.robust import Average, check_average
from msfusion.errors import ConfigError
from msfusion.federated.capacities import Capacities, Capacity
from msfusion.federated.method import Method
from msfusion.federated.problem import Chosen, Problem, Settings, method
from msfusion.methods.adaptive import AdaptiveMethod
from msfusion.methods.blocks import BlocksSettings, blocks_method
from msfusion.methods.copies import CopiesSettings, copies_method, transversals
from msfusion.methods.ensemble import ensemble_method
from msfusion.methods.narrow import NarrowMethod, Weighting, extended
from msfusion.methods.parts.contrastive import WITHOUT, ContrastiveSettings
from msfusion.methods.parts.remembered import OF_MEMORY, REMEMBERED_BYTES
from msfusion.methods.small import SmallMethod, small_method
from msfusion.methods.starts import Start, StartOrAuto, choose_start
from msfusion.methods.windows_of_state import WindowsOfState
from msfusion.setting import check, setting
from msfusion.windows import (
    SCHEDULES,
    CheckedSchedule,
    Feedback,
    Overlap,
    Schedule,
    double_shift_for,
    even_overlap,
    full,
    random,
    rolling,
    static,
)

Ratios = Capacity | tuple[Capacity, ...]
"""One width ratio for all participants, or one for each."""


def _number_of_blocks() -> Any:
    return setting(None, "of a sum of blocks or an ensemble; by default 1 / the least ratio", ge=1, le=1024)


@dataclass(frozen=True, kw_only=True)
class Averaging(Settings):
    """What all of these methods have in common: participants train (parts of) a model, and what comes back is averaged.

    A robust average ("median" or "trimmed") is for entries that several participants hold.
    """

    ratio: Ratios = setting(0.25, "share of each layer's width that a participant holds")
    weighting: Weighting = setting(
        "examples", "a participant's weight in the average: how many examples it has, or 1"
    )
    average: Average = setting(
        "mean",
        "how participants' values of an entry become one: their weighted mean, or, against a few bad ones, the median "
        "or the trimmed mean without weights; or module:function",
    )
    recalibrate: bool | None = setting(
        None,
        "whether BatchNorm's statistics are measured anew, in a pass over the whole model, before it is evaluated; by "
        "default unless msfusion starts as copies",
    )
    contrastive: ContrastiveSettings = setting(WITHOUT, "the loss against drift")

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check(self)

    def check_fits(self, problem: Problem) -> None:
        """Raise ConfigError where these settings do not go with a problem."""
        check_average(self.average)
        people = len(problem.capacities.each)
        if len(problem.training) != people:
            raise ConfigError(
                f"there are {people} ratios but {len(problem.training)} training settings: give one for each"
            )
        if problem.scoring.loss is not None and self.contrastive.weight > 0:
            raise ConfigError(
                "the contrastive loss compares logits of classes, which a loss of one's own may not have: set "
                "method.contrastive_weight to 0"
            )

    def slices(self, problem: Problem, schedule: Schedule) -> NarrowMethod:
        """The method whose participants hold windows of a schedule of the whole model. Raises ConfigError."""
        self.check_fits(problem)
        if self.average != "mean" and schedule is not full:
            raise ConfigError(
                f"method.average = '{self.average}' needs several holders of each entry, and slices of fresh weights "
                "often have one: choose method.start = 'blocks' or 'copies', or method.average = 'mean'"
            )
        return self._narrow(problem, schedule, recalibrate=self.recalibrate is not False)

    def _narrow(self, problem: Problem, schedule: Schedule, *, recalibrate: bool) -> NarrowMethod:
        return NarrowMethod(
            self.name,
            problem.model,
            problem.width_map,
            schedule,
            problem.capacities.typical,
            problem.training,
            seed=problem.seed,
            weighting=self.weighting,
            scoring=problem.scoring,
            contrastive=self.contrastive,
            capacities=problem.capacities,
            recalibrate=recalibrate,
            average=self.average,
        )

    def small_model(self, problem: Problem) -> SmallMethod:
        """FedAvg of the model that the smallest participant can hold. Raises ConfigError."""
        self.check_fits(problem)
        return small_method(
            problem.model,
            problem.width_map,
            problem.capacities.smallest,
            problem.training,
            seed=problem.seed,
            weighting=self.weighting,
            scoring=problem.scoring,
            contrastive=self.contrastive,
            recalibrate=self.recalibrate is not False,
            average=self.average,
        )


@method("msfusion")
@dataclass(frozen=True, kw_only=True)
class MSfusion(Averaging):
    """MSfusion (Xie & Li, arXiv 2407.03622), and what has become of it here.

    `overlap` and `between_rounds` are about windows, `blocks`, `passes`, `first_block` and `remembered_bytes` about
    blocks, `grow_at` and `apart` about copies. What "auto" comes to: `methods.starts`.
    """

    start: StartOrAuto = setting(
        "auto",
        "of msfusion: slices of a model of fresh weights (the paper), a sum of blocks, trained in turn, or slices that "
        "begin as copies of the model of 'small'; auto goes by the length of the run",
    )
    overlap: Overlap | Feedback | None = setting(
        None, "of msfusion's windows; by default they are spread evenly"
    )
    between_rounds: bool = setting(
        True, "msfusion's windows move from round to round; without, to see what that does"
    )
    blocks: int | None = _number_of_blocks()
    passes: int = setting(8, "how often each block of a sum is trained, at most", ge=1)
    first_block: float = setting(
        0.0,
        "share of the rounds in which the first block is trained before the others have their turns",
        ge=0,
        lt=1,
    )
    remembered_bytes: int = setting(
        REMEMBERED_BYTES,
        "of other blocks' logits that a participant keeps; beyond it they are computed in each step",
        ge=0,
    )
    grow_at: float = setting(
        0.33,
        "for start = 'copies': the share of the rounds in which all copies stay equal (FedAvg of 'small')",
        ge=0,
        le=1,
    )
    apart: float = setting(1.0, "for start = 'copies': how far copies may come apart after that", ge=0, le=1)

    @property
    def own_models(self) -> bool | None:
        """Blocks are small models; what an open start comes to depends on the problem."""
        return None if self.start == "auto" else self.start == "blocks"

    def within_memory(self, memory: int) -> MSfusion:
        """What is remembered as logits takes a part of it at most; if that is too little, blocks are kept instead."""
        if self.start not in ("auto", "blocks"):
            return self
        return replace(self, remembered_bytes=min(self.remembered_bytes, memory // OF_MEMORY))

    def build(self, problem: Problem) -> Method:
        """The method with the start that was chosen. Raises ConfigError where it does not fit the problem."""
        return self.chosen(problem).method

    def chosen(self, problem: Problem) -> Chosen:
        """The same, with the settings that it was built with: where `start` is "auto" they say which."""
        return choose_start(self, problem)

    def with_start(self, problem: Problem, start: Start) -> Method:
        """The method with a start that is known."""
        builders: Mapping[Start, Callable[[Problem], Method]] = {
            "fresh": self._fresh,
            "blocks": self._blocks,
            "copies": self._copies,
        }
        return builders[start](problem)

    def _fresh(self, problem: Problem) -> Method:
        """Slices of fresh weights."""
        fixed = self.overlap if isinstance(self.overlap, Overlap) else None
        ratios = problem.capacities.typical
        schedule = double_shift_for(ratios, fixed, between_rounds=self.between_rounds)
        made = replace(self.slices(problem, schedule), overlaps=partial(_overlap_in, fixed, ratios))
        if isinstance(self.overlap, Feedback):
            return extended(made, AdaptiveMethod, feedback=self.overlap, between_rounds=self.between_rounds)
        return made

    def _blocks(self, problem: Problem) -> Method:
        """A sum of small models."""
        settings = BlocksSettings(
            problem.rounds, self.blocks, self.passes, self.first_block, self.remembered_bytes
        )
        small = self.small_model(problem)
        return blocks_method(self.name, small, problem.model, problem.width_map, settings, problem.capacities)

    def _copies(self, problem: Problem) -> Method:
        """Slices of copies of the small model."""
        if isinstance(self.overlap, Feedback):
            raise ConfigError(
                "an overlap by feedback goes by how much slices of fresh weights disagree: choose another shape of "
                "method.overlap, or method.start = 'fresh'"
            )
        self.check_fits(problem)
        capacities = problem.capacities
        schedule = transversals(capacities, self.overlap, between_rounds=self.between_rounds)
        slices = self._narrow(problem, schedule, recalibrate=self.recalibrate is True)
        made = copies_method(
            replace(slices, overlaps=partial(_overlap_in, self.overlap, capacities.typical)),
            CopiesSettings(math.ceil(self.grow_at * problem.rounds), self.apart),
        )
        made.check(problem.example)
        return made


def _overlap_in(overlap: Overlap | None, ratios: tuple[float, ...], round_index: int) -> float:
    """What neighbours' windows have in common in a round."""
    return even_overlap(ratios) if overlap is None else overlap.applied(round_index, ratios)


@method("fedrolex")
@dataclass(frozen=True, kw_only=True)
class FedRolex(Averaging):
    """Windows that roll on by one unit from round to round (Alam et al., NeurIPS 2022)."""

    def build(self, problem: Problem) -> Method:
        """The method. Raises ConfigError where it does not fit the problem."""
        return self.slices(problem, rolling)


@method("heterofl")
@dataclass(frozen=True, kw_only=True)
class HeteroFL(Averaging):
    """Everybody holds the first units (Diao et al., ICLR 2021)."""

    def build(self, problem: Problem) -> Method:
        """The method. Raises ConfigError where it does not fit the problem."""
        return self.slices(problem, static)


@method("feddropout")
@dataclass(frozen=True, kw_only=True)
class FederatedDropout(Averaging):
    """Everybody holds random units, others in each round (Caldas et al., arXiv 1812.07210)."""

    def build(self, problem: Problem) -> Method:
        """The method. Raises ConfigError where it does not fit the problem."""
        return self.slices(problem, random)


@method("fedavg")
@dataclass(frozen=True, kw_only=True)
class FedAvg(Averaging):
    """Everybody holds the whole model (McMahan et al., AISTATS 2017)."""

    ratio: Ratios = 1.0

    holds_everything: ClassVar[bool] = True
    role: ClassVar[Literal["floor", "ceiling"] | None] = "ceiling"

    def build(self, problem: Problem) -> Method:
        """The method. Raises ConfigError where it does not fit the problem."""
        return self.slices(problem, full)


@method("windows")
@dataclass(frozen=True, kw_only=True)
class Windows(Averaging):
    """Windows of a schedule of one's own: a name that one is registered under, `module:function`, or a function.

    A schedule that has an attribute `of_state` is given the weights, and its units travel (`methods.windows_of_state`).
    """

    schedule: str | Schedule = setting(
        "double_shift",
        "of method.name = 'windows': which units a participant holds in a round, a name or module:function",
    )

    def build(self, problem: Problem) -> Method:
        """The method. Raises ConfigError where there is no such schedule."""
        given = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        chosen = given if given is full else CheckedSchedule(given)
        if not getattr(given, "of_state", False):
            return self.slices(problem, chosen)
        if self.contrastive.weight > 0:
            raise ConfigError(
                "the contrastive loss rebuilds the window of an earlier round, which goes by weights that are gone: "
                "set method.contrastive_weight to 0"
            )
        return extended(self.slices(problem, static), WindowsOfState, choose=chosen)


@method("small")
@dataclass(frozen=True, kw_only=True)
class Small(Averaging):
    """FedAvg of a small model that everybody can hold: the floor of every comparison."""

    role: ClassVar[Literal["floor", "ceiling"] | None] = "floor"

    @property
    def own_models(self) -> bool:
        """One small model."""
        return True

    def build(self, problem: Problem) -> Method:
        """The small model. Raises ConfigError where it does not fit the problem."""
        return self.small_model(problem)


@method("ensemble")
@dataclass(frozen=True, kw_only=True)
class Ensemble(Averaging):
    """Several small models, trained one after the other."""

    blocks: int | None = _number_of_blocks()

    @property
    def own_models(self) -> bool:
        """Several small models."""
        return True

    def build(self, problem: Problem) -> Method:
        """The ensemble. Raises ConfigError where it does not fit the problem."""
        if problem.scoring.loss is not None:
            raise ConfigError(
                "an ensemble averages probabilities of classes, and with this training.loss there need be none: "
                "choose another method"
            )
        capacities, settings = problem.capacities, BlocksSettings(problem.rounds, self.blocks)
        small = self.small_model(problem)
        return ensemble_method(
            self.name, small, problem.model, problem.width_map, settings, capacities.smallest
        )


def capacities_of(ratio: Ratios, participants: int, seed: int) -> Capacities:
    """The width ratio of each participant in each round. Raises ConfigError where there is not one for each."""
    each = ratio if isinstance(ratio, tuple) else (ratio,) * participants
    if len(each) != participants:
        raise ConfigError(
            f"there are {len(each)} width ratios and {participants} participants: give one, or one for each"
        )
    return Capacities(each, seed)
