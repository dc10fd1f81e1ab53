"""The methods of the house by name: what a user chooses of each, and how it is built."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from msfusion.averaging.robust import Average, check_average
from msfusion.errors import ConfigError
from msfusion.federated.capacities import Capacities, Capacity
from msfusion.federated.method import Method
from msfusion.federated.problem import Chosen, Problem, Settings, method
from msfusion.methods.blocks import BlocksSettings
from msfusion.methods.copies import CopiesMethod, CopiesSettings
from msfusion.methods.narrow import NarrowMethod, Weighting
from msfusion.methods.parts.contrastive import WITHOUT, ContrastiveSettings
from msfusion.methods.parts.remembered import REMEMBERED_BYTES
from msfusion.methods.starts import AUTO, choose_start
from msfusion.methods.table import Start, build_method, refuse_few_holders, refuse_own_loss
from msfusion.methods.windows_of_state import WindowsOfState
from msfusion.setting import check, setting
from msfusion.windows import SCHEDULES, CheckedSchedule, Feedback, Overlap, Schedule, full, static

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

    def build(self, problem: Problem) -> Method:
        """The method of the table with this name. Raises ConfigError where it does not fit the problem."""
        return self._built(problem)

    def _built(
        self,
        problem: Problem,
        *,
        start: Start = "fresh",
        overlap: Overlap | Feedback | None = None,
        between_rounds: bool = True,
        blocks: BlocksSettings | None = None,
        copies: CopiesSettings | None = None,
    ) -> Method:
        return build_method(
            self.name,
            problem.model,
            problem.width_map,
            problem.capacities,
            problem.training,
            seed=problem.seed,
            weighting=self.weighting,
            scoring=problem.scoring,
            overlap=overlap,
            contrastive=self.contrastive,
            between_rounds=between_rounds,
            start=start,
            blocks=blocks,
            copies=copies,
            recalibrate=self.recalibrate,
            average=self.average,
        )


@method("msfusion")
@dataclass(frozen=True, kw_only=True)
class MSfusion(Averaging):
    """MSfusion (Xie & Li, arXiv 2407.03622), and what has become of it here.

    `overlap` and `between_rounds` are about windows, `blocks`, `passes`, `first_block` and `remembered_bytes` about
    blocks, `grow_at` and `apart` about copies. What "auto" comes to: `methods.starts`.
    """

    start: Start | AUTO = setting(
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

    def build(self, problem: Problem) -> Method:
        """The method with the start that was chosen. Raises ConfigError where it does not fit the problem."""
        return self.chosen(problem).method

    def chosen(self, problem: Problem) -> Chosen:
        """The same, with the settings that it was built with: where `start` is "auto" they say which."""
        return choose_start(self, problem)

    def with_start(self, problem: Problem, start: Start) -> Method:
        """The method with a start that is known."""
        blocks = BlocksSettings(
            problem.rounds, self.blocks, self.passes, self.first_block, self.remembered_bytes
        )
        copies = CopiesSettings(math.ceil(self.grow_at * problem.rounds), self.apart)
        made = self._built(
            problem,
            start=start,
            overlap=self.overlap,
            between_rounds=self.between_rounds,
            blocks=blocks,
            copies=copies if start == "copies" else None,
        )
        if isinstance(made, CopiesMethod):
            made.check(problem.example)
        return made


@method("fedrolex")
@dataclass(frozen=True, kw_only=True)
class FedRolex(Averaging):
    """Windows that roll on by one unit from round to round (Alam et al., NeurIPS 2022)."""


@method("heterofl")
@dataclass(frozen=True, kw_only=True)
class HeteroFL(Averaging):
    """Everybody holds the first units (Diao et al., ICLR 2021)."""


@method("feddropout")
@dataclass(frozen=True, kw_only=True)
class FederatedDropout(Averaging):
    """Everybody holds random units, others in each round (Caldas et al., arXiv 1812.07210)."""


@method("fedavg")
@dataclass(frozen=True, kw_only=True)
class FedAvg(Averaging):
    """Everybody holds the whole model (McMahan et al., AISTATS 2017)."""

    ratio: Ratios = 1.0

    holds_everything: ClassVar[bool] = True
    role: ClassVar[Literal["floor", "ceiling"] | None] = "ceiling"


@method("small")
@dataclass(frozen=True, kw_only=True)
class Small(Averaging):
    """FedAvg of a small model that everybody can hold: the floor of every comparison."""

    role: ClassVar[Literal["floor", "ceiling"] | None] = "floor"

    @property
    def own_models(self) -> bool:
        """One small model."""
        return True


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
        of_state = bool(getattr(given, "of_state", False))
        chosen = given if given is full else CheckedSchedule(given)
        check_average(self.average)
        refuse_few_holders(self.average, given)
        made = NarrowMethod(
            self.name,
            problem.model,
            problem.width_map,
            static if of_state else chosen,
            problem.capacities.typical,
            problem.training,
            seed=problem.seed,
            weighting=self.weighting,
            scoring=problem.scoring,
            contrastive=self.contrastive,
            capacities=problem.capacities,
            recalibrate=self.recalibrate is not False,
            average=self.average,
        )
        refuse_own_loss(problem.scoring, self.name, self.contrastive)
        if not of_state:
            return made
        if self.contrastive.weight > 0:
            raise ConfigError(
                "the contrastive loss rebuilds the window of an earlier round, which goes by weights that are gone: "
                "set method.contrastive_weight to 0"
            )
        same = {each.name: getattr(made, each.name) for each in fields(made)}
        return WindowsOfState(**same, choose=chosen)


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
        return self._built(problem, blocks=BlocksSettings(problem.rounds, self.blocks))


def capacities_of(ratio: Ratios, participants: int, seed: int) -> Capacities:
    """The width ratio of each participant in each round. Raises ConfigError where there is not one for each."""
    each = ratio if isinstance(ratio, tuple) else (ratio,) * participants
    if len(each) != participants:
        raise ConfigError(
            f"there are {len(each)} width ratios and {participants} participants: give one, or one for each"
        )
    return Capacities(each, seed)
