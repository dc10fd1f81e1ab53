"""The table [network] of a configuration: the participants' machines and links, and the deadline of a round."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from msfusion.experiment.config.declared import Section, key_of
from msfusion.federated.participation import Conditions, Late
from msfusion.network import PROFILES, LogNormal, Machine, MachineKind, Uniform


class DistributionSection(Section):
    """`{ median, sigma }` is log-normal, `{ low, high }` uniform; each participant draws its own value."""

    median: float | None = Field(default=None, gt=0, description="half of the values are above it")
    sigma: float | None = Field(
        default=None,
        ge=0,
        description="two thirds of the values are within a factor of exp(sigma) of the median",
    )
    low: float | None = Field(default=None, ge=0, description="the least value")
    high: float | None = Field(default=None, gt=0, description="the largest value")

    @property
    def amount(self) -> LogNormal | Uniform:
        """The same as the library knows it."""
        if self.median is not None and self.sigma is not None:
            return LogNormal(self.median, self.sigma)
        assert self.low is not None
        assert self.high is not None
        return Uniform(self.low, self.high)


def _checked_amount(value: Any) -> Any:
    """A number, or a distribution."""
    if isinstance(value, DistributionSection):
        return value
    if isinstance(value, dict):
        numbers = all(isinstance(each, int | float) and not isinstance(each, bool) for each in value.values())
        if not numbers or set(value) not in ({"median", "sigma"}, {"low", "high"}):
            raise ValueError(
                "should have median and sigma (log-normal) or low and high (uniform), as numbers"
            )
        if not min(value.values()) > 0:
            raise ValueError("should have numbers above 0")
        if "low" in value and value["low"] > value["high"]:
            raise ValueError("should have a low that is not above its high")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("should be a number, or a table with median and sigma or with low and high")
    return float(value)


def _checked_rate(value: Any) -> Any:
    """An amount above zero."""
    if isinstance(value, int | float) and not value > 0:
        raise ValueError("should be above 0")
    return _checked_amount(value)


def _checked_latency(value: Any) -> Any:
    """An amount, zero too."""
    if isinstance(value, int | float) and value < 0:
        raise ValueError("should be at least 0")
    return _checked_amount(value)


_Rate = Annotated[float | DistributionSection, BeforeValidator(_checked_rate)]
_Latency = Annotated[float | DistributionSection, BeforeValidator(_checked_latency)]


class MachineSection(Section):
    """A participant's machine and link: numbers, or distributions from which each participant draws."""

    download_megabits: _Rate = key_of(Machine, "download_megabits", gt=None)
    upload_megabits: _Rate = key_of(Machine, "upload_megabits", gt=None)
    latency_seconds: _Latency = key_of(Machine, "latency_seconds", default=0.0, ge=None)
    gigaflops: _Rate = key_of(Machine, "gigaflops", gt=None)
    dropout: float = key_of(Machine, "dropout")

    @property
    def kind(self) -> MachineKind:
        """The same as the library knows it."""
        drawn: dict[str, Any] = {
            name: value.amount for name, value in self if isinstance(value, DistributionSection)
        }
        return self.made(MachineKind, **drawn)


def _as_tuple(value: Any) -> Any:
    """A list as a tuple."""
    return tuple(value) if isinstance(value, list) else value


def _one_or_each(value: Any) -> str:
    """Which of the two `machines` is: mistakes are then told of that one alone."""
    return "each" if isinstance(value, tuple) else "one"


_Machines = Annotated[
    Annotated[MachineSection, Tag("one")] | Annotated[tuple[MachineSection, ...], Tag("each")],
    Discriminator(_one_or_each),
]


class NetworkSection(Section):
    """A simulated clock: either a named `profile`, or `machines`, one table for all or one for each participant.

    Where a round has a `deadline`, `late` says what becomes of updates that are not there by then.
    """

    profile: str | None = Field(default=None, description=" or ".join(PROFILES))
    machines: Annotated[_Machines | None, BeforeValidator(_as_tuple)] = Field(
        default=None, description="one table for all participants, or one for each"
    )
    deadline: float | None = key_of(Conditions, "deadline")
    late: Late = key_of(Conditions, "late")
    late_weight: float = key_of(Conditions, "late_weight")

    @model_validator(mode="after")
    def _fits_together(self) -> NetworkSection:
        if (self.profile is None) == (self.machines is None):
            raise ValueError("should have either a profile or machines")
        if self.profile is not None and self.profile not in PROFILES:
            raise ValueError(f"should have as its profile one of {', '.join(PROFILES)}")
        if self.late == "downweight" and self.deadline is None:
            raise ValueError("should have a deadline, if late updates are to be counted in part")
        return self

    def kinds(self, participants: int) -> tuple[MachineKind, ...]:
        """What is known of each participant's machine."""
        if isinstance(self.machines, tuple):
            return tuple(machine.kind for machine in self.machines)
        kind = PROFILES[self.profile or ""] if self.machines is None else self.machines.kind
        return (kind,) * participants
