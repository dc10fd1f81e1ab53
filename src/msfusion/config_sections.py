"""The tables of a configuration: their keys, types, defaults, and what each value may be."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, field_validator

from msfusion.budgets import Budget
from msfusion.data.spec import DataSpec
from msfusion.methods.contrastive import WITHOUT, ContrastiveSettings
from msfusion.methods.training import TrainingSettings
from msfusion.models.spec import ModelSpec
from msfusion.windows.overlap import OverlapShape

MethodName = Literal["msfusion", "fedrolex", "heterofl", "feddropout", "fedavg", "small"]


class Section(BaseModel):
    """A table of the configuration: no unknown keys, no silent conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _section(specification: type[Any], *, without: Iterable[str] = ()) -> type[Section]:
    """The section whose keys, types and defaults are the fields of a dataclass, but for those set elsewhere.

    The dataclass checks the values when the section is read: its ConfigError becomes the reader's.
    """
    types = typing.get_type_hints(specification)
    fields: dict[str, Any] = {
        field.name: (
            types[field.name],
            Field(default_factory=field.default_factory)
            if field.default_factory is not dataclasses.MISSING
            else field.default,
        )
        for field in dataclasses.fields(specification)
        if field.name not in without
    }
    return create_model(f"{specification.__name__}Section", __base__=Section, **fields)


if TYPE_CHECKING:

    class DataSection(Section):
        """The keys of DataSpec."""

    class ModelSection(Section):
        """The keys of ModelSpec."""

    class TrainingSection(Section):
        """The keys of TrainingSettings."""
else:
    DataSection = _section(DataSpec, without=("participants", "seed"))
    ModelSection = _section(ModelSpec, without=("seed",))
    TrainingSection = _section(TrainingSettings, without=("rounds",))


def _checked_ratio(value: Any) -> float | tuple[float, ...]:
    ratios = value if isinstance(value, list | tuple) else [value]
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise ValueError("should be a number greater than 0 and at most 1, or a list of such numbers")
    return tuple(float(ratio) for ratio in ratios) if isinstance(value, list | tuple) else float(value)


class OverlapSection(Section):
    """How much of its window a participant shares with its neighbour: from `start` to `end` over the rounds, or
    from `start` on by feedback.
    """

    shape: OverlapShape | Literal["feedback"] = "constant"
    start: float = Field(ge=0, le=1)
    end: float | None = Field(default=None, ge=0, le=1, description="in the last round; by default as start")
    target: float = Field(default=0.5, ge=0, le=1, description="feedback: the disagreement that is aimed at")
    gain: float = Field(default=0.2, gt=0, description="feedback: how strongly the overlap follows")


class MethodSection(Section):
    """How the participants' work becomes one model."""

    name: MethodName = "msfusion"
    weighting: Literal["examples", "uniform"] = Field(
        default="examples",
        description="a participant's weight in the average: how many examples it has, or 1",
    )
    overlap: OverlapSection | None = Field(
        default=None, description="of msfusion's windows; by default they are spread evenly"
    )
    contrastive_weight: float = Field(
        default=WITHOUT.weight, ge=0, description="of the loss against drift; 0 is without"
    )
    contrastive_temperature: float = Field(default=WITHOUT.temperature, gt=0)
    contrastive_every: int = Field(
        default=WITHOUT.every,
        ge=1,
        description="mini-batches from one with the loss to the next; 1 is the paper",
    )

    @property
    def contrastive(self) -> ContrastiveSettings:
        """The contrastive loss that the participants train with."""
        return ContrastiveSettings(
            self.contrastive_weight, self.contrastive_temperature, self.contrastive_every
        )


_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _checked_bytes(value: Any) -> Any:
    """A number of bytes, from a text such as "64 MB" too."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([0-9]+(?:[.][0-9]+)?) *([A-Za-z]+)", value.strip())
    if found is None or found[2] not in _UNITS:
        raise ValueError(f"should be a number of bytes, with or without a unit ({', '.join(_UNITS)})")
    return round(float(found[1]) * _UNITS[found[2]])


def _checked_budget(value: Any) -> Any:
    """A table, or a list of them as a tuple."""
    return tuple(value) if isinstance(value, list) else value


class BudgetSection(Section):
    """What a participant's machine can bear: numbers, or for bytes texts such as "64 MB"."""

    memory: Annotated[int | None, BeforeValidator(_checked_bytes)] = Field(default=None, gt=0)
    flops_per_example: float | None = Field(default=None, gt=0)
    bytes_per_round: Annotated[int | None, BeforeValidator(_checked_bytes)] = Field(default=None, gt=0)

    @property
    def budget(self) -> Budget:
        """The same as the library knows it."""
        return Budget(self.memory, self.flops_per_example, self.bytes_per_round)


class ParticipantsSection(Section):
    """Who takes part. `ratio` is one width ratio for all, or one for each; with a `budget`, again one for all or
    one for each, the ratio is instead the largest that fits.
    """

    count: int = Field(default=10, ge=1)
    ratio: Annotated[float | tuple[float, ...], BeforeValidator(_checked_ratio)] = 0.25
    budget: Annotated[BudgetSection | tuple[BudgetSection, ...] | None, BeforeValidator(_checked_budget)] = (
        None
    )
    fraction: float = Field(default=1.0, gt=0, le=1)

    @field_validator("ratio", "budget")
    @classmethod
    def _one_for_each(cls, value: Any, info: Any) -> Any:
        count = info.data.get("count")
        if isinstance(value, tuple) and count is not None and len(value) != count:
            kind = "number" if info.field_name == "ratio" else "table"
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
        return tuple(section.budget for section in each)

    @property
    def ratios(self) -> tuple[float, ...]:
        """The width ratio of each participant."""
        return self.ratio if isinstance(self.ratio, tuple) else (self.ratio,) * self.count


class EvaluationSection(Section):
    """When the fused model is tested, and on how many examples at once."""

    every: int = Field(
        default=1, ge=1, description="rounds between evaluations; the last round always has one"
    )
    batch_size: int = Field(default=256, ge=1)


class RunSection(Section):
    """How the run is carried out."""

    workers: int = Field(default=1, ge=1, description="processes; the results are the same for any number")
    threads: int = Field(default=1, ge=1, description="of each worker")
    together: int = Field(
        default=1,
        ge=1,
        description="participants that a worker trains at once, stacked; same results but for rounding",
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where participants train")
    checkpoint_every: int = Field(default=1, ge=1, description="rounds between checkpoints")
