"""The table [participants] of a configuration: who takes part, and how much each can hold."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from msfusion.budgets import Budget
from msfusion.data.spec import DataSpec
from msfusion.experiment.config.declared import Section, key_of, section_of
from msfusion.experiment.config.sections import Bytes
from msfusion.federated.capacities import Capacities, Capacity, FromRound, OneOf
from msfusion.federated.participation import RoundSettings
from msfusion.federated.screening import Screening
from msfusion.methods.settings import Averaging


class ChangingRatioSection(Section):
    """A ratio that changes: in each round one of `any_of`, or from some rounds on (`from_round`) another."""

    any_of: tuple[float, ...] | None = Field(default=None, description="drawn anew in each round")
    from_round: dict[str, float] | None = Field(
        default=None, description="by the number of the round, which counts from 1"
    )

    @property
    def capacity(self) -> Capacity:
        """The same as the library knows it, where rounds count from 0."""
        if self.any_of is not None:
            return OneOf(self.any_of)
        steps = {int(number) - 1: ratio for number, ratio in (self.from_round or {}).items()}
        return FromRound(tuple(sorted(steps.items())))


def _checked_ratio(value: Any) -> Any:
    """A number, a table that says how it changes, or a list of these as a tuple."""
    if isinstance(value, list | tuple):
        return tuple(_checked_capacity(each) for each in value)
    return _checked_capacity(value)


def _checked_capacity(value: Any) -> float | ChangingRatioSection:
    if isinstance(value, ChangingRatioSection):
        return value
    if isinstance(value, dict):
        return _checked_change(value)
    if not _is_ratio(value):
        raise ValueError("should be a number greater than 0 and at most 1, or a list of such numbers")
    return float(value)


def _checked_change(value: dict[str, Any]) -> ChangingRatioSection:
    """A ratio's table. Raises ValueError, which pydantic makes the user's sentence of."""
    if len(value) == 1:
        choices, rounds = value.get("any_of"), value.get("from_round")
        if isinstance(choices, list | tuple) and choices and all(_is_ratio(ratio) for ratio in choices):
            return ChangingRatioSection(any_of=tuple(float(ratio) for ratio in choices))
        if isinstance(rounds, dict) and all(_is_ratio(ratio) for ratio in rounds.values()):
            numbers = [int(number) for number in rounds if re.fullmatch("[1-9][0-9]{0,8}", number)]
            if len(numbers) == len(rounds) and 1 in numbers:
                return ChangingRatioSection(
                    from_round={number: float(ratio) for number, ratio in rounds.items()}
                )
    raise ValueError(
        "should be a number, or { any_of = [ratio, ...] }, or { from_round = { 1 = ratio, ... } } that begins with "
        "round 1; ratios are greater than 0 and at most 1"
    )


def _is_ratio(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _checked_budget(value: Any) -> Any:
    """A table, or a list of them as a tuple."""
    return tuple(value) if isinstance(value, list) else value


if TYPE_CHECKING:

    class BudgetSection(Section):
        """The keys of Budget, with texts such as "64 MB" for bytes."""
else:
    BudgetSection = section_of(Budget, read_as=dict.fromkeys(("memory", "bytes_per_round"), Bytes | None))


def _checked_dropout(value: Any) -> Any:
    """A probability, or a list of them as a tuple."""
    each = value if isinstance(value, list | tuple) else [value]
    for one in each:
        if one is not None and (
            isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one < 1
        ):
            raise ValueError("should be a number at least 0 and below 1, or a list of such numbers")
    return tuple(float(one) for one in value) if isinstance(value, list | tuple) else value


class ParticipantsSection(Section):
    """Who takes part. `ratio` is one width ratio for all, or one for each, and may change from round to round;
    with a `budget`, again one for all or one for each, the ratio is instead the largest that fits.
    """

    count: int = key_of(DataSpec, "participants", le=100_000)
    ratio: Annotated[
        float | ChangingRatioSection | tuple[float | ChangingRatioSection, ...],
        BeforeValidator(_checked_ratio),
    ] = key_of(Averaging, "ratio")
    budget: Annotated[BudgetSection | tuple[BudgetSection, ...] | None, BeforeValidator(_checked_budget)] = (
        Field(default=None, description="what a participant's machine can bear; decides the ratio instead")
    )
    fraction: float = key_of(RoundSettings, "fraction")
    max_examples: int | None = key_of(Screening, "max_examples")
    minimum_ratio: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="whoever has less in a round is not asked; by default everybody is",
    )
    dropout: Annotated[float | tuple[float, ...] | None, BeforeValidator(_checked_dropout)] = Field(
        default=None,
        description="probability of being absent from a round, one for all or one for each; by default that of "
        "the participant's machine in the network, or 0",
    )

    @field_validator("ratio", "budget", "dropout")
    @classmethod
    def _one_for_each(cls, value: Any, info: Any) -> Any:
        count = info.data.get("count")
        if isinstance(value, tuple) and count is not None and len(value) != count:
            kind = "table" if info.field_name == "budget" else "number"
            raise ValueError(
                f"should be one {kind}, or one for each of the {count} participants, not {len(value)}"
            )
        return value

    @property
    def budgets(self) -> tuple[Budget, ...] | None:
        """The budget of each participant; None where ratios are given."""
        if self.budget is None:
            return None
        each = self.budget if isinstance(self.budget, tuple) else (self.budget,) * self.count
        return tuple(section.made(Budget) for section in each)

    @model_validator(mode="after")
    def _fits_together(self) -> ParticipantsSection:
        each = self.ratio if isinstance(self.ratio, tuple) else (self.ratio,)
        if self.budget is not None and any(isinstance(one, ChangingRatioSection) for one in each):
            raise ValueError("should not have a budget, which decides the ratio, and a ratio that changes")
        capacities, least = self.capacities(0), self.minimum_ratio
        largest = max(capacities.possible(each)[0] for each in range(self.count))
        if self.budget is None and least is not None and largest < least:
            raise ValueError(f"should have somebody with at least the minimum_ratio, {least:g}")
        return self

    def capacities(self, seed: int) -> Capacities:
        """The width ratio of each participant in each round."""
        each = self.ratio if isinstance(self.ratio, tuple) else (self.ratio,) * self.count
        return Capacities(
            tuple(one.capacity if isinstance(one, ChangingRatioSection) else one for one in each), seed
        )

    @property
    def ratios(self) -> tuple[float, ...]:
        """The width ratio of each participant, where it changes the mean of its values."""
        return self.capacities(0).typical
