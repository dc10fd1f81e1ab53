"""The tables of a configuration: their keys, types, defaults, and what each value may be."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, field_validator

from msfusion.averaging.robust import AVERAGES, Average
from msfusion.codecs import CODECS, Codec, by_table
from msfusion.data.spec import DataSpec
from msfusion.errors import ConfigError
from msfusion.federated.problem import METHODS
from msfusion.federated.screening import DEFAULT, BadUpdate
from msfusion.federated.training import TrainingSettings
from msfusion.imports import import_function, is_reference
from msfusion.methods.parts.contrastive import WITHOUT, ContrastiveSettings
from msfusion.methods.parts.remembered import REMEMBERED_BYTES
from msfusion.methods.split.rounds import Clients, ServerStep, SplitSettings
from msfusion.methods.split.wire import Derivative
from msfusion.methods.table import Start
from msfusion.models.spec import ModelSpec
from msfusion.scoring import LOSSES, METRICS, TORCH_METRICS
from msfusion.windows.overlap import OverlapShape

MethodName = Literal[
    "msfusion",
    "fedrolex",
    "heterofl",
    "feddropout",
    "fedavg",
    "windows",
    "small",
    "ensemble",
    "split",
    "fedgrow",
]

HOUSE: tuple[str, ...] = typing.get_args(MethodName)
"""The methods of the house."""


class Section(BaseModel):
    """A table of the configuration: no unknown keys, no silent conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def section_of(specification: type[Any], *, without: Iterable[str] = ()) -> type[Section]:
    """The section whose keys, types and defaults are the fields of a dataclass, but for those set elsewhere.

    The dataclass checks the values when the section is read: its ConfigError becomes the reader's.
    """
    fields = keys_of(specification, without=without)
    return create_model(f"{specification.__name__}Section", __base__=Section, **fields)


def keys_of(specification: type[Any], *, without: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass as pydantic takes them: by name a type and a default."""
    types = typing.get_type_hints(specification)
    return {
        field.name: (types[field.name], _default_of(field))
        for field in dataclasses.fields(specification)
        if field.init and field.name not in without
    }


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return Field(default_factory=field.default_factory)
    return ... if field.default is dataclasses.MISSING else field.default


def _known_loss(value: Any) -> Any:
    """The name of a loss, or of a function of the user's."""
    if (
        isinstance(value, str)
        and value != "cross_entropy"
        and value not in LOSSES
        and not is_reference(value)
    ):
        raise ValueError(f"should be {', '.join(map(repr, ['cross_entropy', *LOSSES]))}, or module:function")
    return value


def _known_metrics(value: Any) -> Any:
    """Names of metrics, as a tuple."""
    names = [*TORCH_METRICS, *METRICS]
    if not isinstance(value, list | tuple):
        raise ValueError("should be a list of names")
    for each in value if isinstance(value, list | tuple) else []:
        if isinstance(each, str) and each not in names and not is_reference(each):
            raise ValueError(f"should be a list of {', '.join(map(repr, names))}, or module:function")
    return tuple(value) if isinstance(value, list) else value


def training_of(section: LocalTrainingSection, rounds: int | None) -> TrainingSettings:
    """How participants train. Raises ConfigError on an impossible value."""
    return TrainingSettings(**{key: value for key, value in section if key != "loss"}, rounds=rounds)


if TYPE_CHECKING:

    class DataSection(Section):
        """The keys of DataSpec."""

    class ModelSection(Section):
        """The keys of ModelSpec."""

    class LocalTrainingSection(Section):
        """The keys of TrainingSettings."""

    class TrainingSection(LocalTrainingSection):
        """With the loss."""

        loss: str = "cross_entropy"
else:
    DataSection = section_of(DataSpec, without=("participants", "seed"))
    ModelSection = section_of(ModelSpec, without=("seed",))
    LocalTrainingSection = section_of(TrainingSettings, without=("rounds",))
    TrainingSection = create_model(
        "TrainingSection",
        __base__=LocalTrainingSection,
        loss=(Annotated[str, BeforeValidator(_known_loss)], "cross_entropy"),
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


Bytes = Annotated[int, BeforeValidator(_checked_bytes)]
"""A number of bytes, or a text such as "64 MB"."""


def _known_average(value: Any) -> Any:
    """The name of an average, or of a function of the user's."""
    if isinstance(value, str) and value != "mean" and value not in AVERAGES and not is_reference(value):
        raise ValueError(f"should be {', '.join(map(repr, ['mean', *AVERAGES]))}, or module:function")
    return value


class OverlapSection(Section):
    """How much of its window a participant shares with its neighbour: from `start` to `end` over the rounds, or
    from `start` on by feedback.
    """

    shape: OverlapShape | Literal["feedback"] = "constant"
    start: float = Field(ge=0, le=1)
    end: float | None = Field(default=None, ge=0, le=1, description="in the last round; by default as start")
    target: float = Field(default=0.5, ge=0, le=1, description="feedback: the disagreement that is aimed at")
    gain: float = Field(default=0.2, gt=0, description="feedback: how strongly the overlap follows")


def _known_method(value: Any) -> Any:
    """The name of a method, or of a class of the user's."""
    if isinstance(value, str) and value not in HOUSE and value not in METHODS and not is_reference(value):
        raise ValueError(f"should be {', '.join(map(repr, HOUSE))}, or module:Class")
    return value


class MethodSection(Section):
    """How the participants' work becomes one model."""

    name: Annotated[str, BeforeValidator(_known_method)] = "msfusion"
    weighting: Literal["examples", "uniform"] = Field(
        default="examples",
        description="a participant's weight in the average: how many examples it has, or 1",
    )
    average: Annotated[Average, BeforeValidator(_known_average)] = Field(
        default="mean",
        description="how participants' values of an entry become one: their weighted mean, or, against a few bad ones, "
        "the median or the trimmed mean without weights; or module:function",
    )
    start: Start | Literal["auto"] = Field(
        default="auto",
        description="of msfusion: slices of a model of fresh weights (the paper), a sum of blocks, trained in turn, or "
        "slices that begin as copies of the model of 'small'; auto goes by the length of the run",
    )
    blocks: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="of a sum of blocks or an ensemble; by default 1 / the least ratio",
    )
    passes: int = Field(default=8, ge=1, description="how often each block of a sum is trained, at most")
    first_block: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the rounds in which the first block is trained before the others have their turns",
    )
    remembered_bytes: Bytes = Field(
        default=REMEMBERED_BYTES,
        ge=0,
        description="of other blocks' logits that a participant keeps; beyond it they are computed in each step",
    )
    overlap: OverlapSection | None = Field(
        default=None, description="of msfusion's windows; by default they are spread evenly"
    )
    between_rounds: bool = Field(
        default=True,
        description="msfusion's windows move from round to round; without, to see what that does",
    )
    schedule: str = Field(
        default="double_shift",
        description="of method.name = 'windows': which units a participant holds in a round, a name or module:function",
    )
    bad_update: BadUpdate = Field(
        default=DEFAULT.bad_update,
        description="of a participant whose update is no good: the round goes on without it, or the run stops",
    )
    max_update_norm: float = Field(
        default=DEFAULT.max_update_norm,
        description="times the median of the round; an update that changes more is a bad one; 0 is any",
    )
    grow_at: float = Field(
        default=0.33,
        ge=0,
        le=1,
        description="for start = 'copies': the share of the rounds in which all copies stay equal (FedAvg of 'small')",
    )
    apart: float = Field(
        default=1.0, ge=0, le=1, description="for start = 'copies': how far copies may come apart after that"
    )
    recalibrate: bool | None = Field(
        default=None,
        description="whether BatchNorm's statistics are measured anew, in a pass over the whole model, before it is "
        "evaluated; by default unless msfusion starts as copies",
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

    @field_validator("max_update_norm")
    @classmethod
    def _one_at_least(cls, value: float) -> float:
        if value != 0 and value < 1:
            raise ValueError("should be at least 1 (times the median of the round), or 0 for any")
        return value

    @property
    def contrastive(self) -> ContrastiveSettings:
        """The contrastive loss that the participants train with."""
        return ContrastiveSettings(
            self.contrastive_weight, self.contrastive_temperature, self.contrastive_every
        )


def _true_as_text(value: Any) -> Any:
    """`derivative = true` without quotation marks is what `--set split.derivative=true` says."""
    return "true" if value is True else value


class SplitSection(Section):
    """Where split learning cuts the model, and how what crosses becomes bytes."""

    at: str = Field(description="the module after which the model is cut, by its name")
    activations: str | dict[str, Any] = Field(
        default="small",
        description="a codec for what goes up: a profile, or a table { codec = 'top_k', ... } with its settings",
    )
    gradients: str | dict[str, Any] = Field(
        default="scaled", description="a codec for what comes down: blocks of it differ much in size"
    )
    server_step: ServerStep = Field(
        default="each",
        description="a step for each participant's mini-batch, or one for those of all (joined)",
    )
    clients: Clients = Field(
        default="averaged",
        description="first layers: averaged after each round, or relayed from hand to hand",
    )
    derivative: Annotated[Derivative, BeforeValidator(_true_as_text)] = Field(
        default="identity",
        description="of the activations' codec: the identity, or the true one, whose gradients are few",
    )

    @property
    def settings(self) -> SplitSettings:
        """What the engine takes. Raises ConfigError on an unknown codec or an impossible setting."""
        codecs = {key: _codec(key, getattr(self, key)) for key in ("activations", "gradients")}
        return SplitSettings(
            self.at,
            **codecs,
            server_step=self.server_step,
            clients=self.clients,
            derivative=self.derivative,
        )


def _codec(key: str, given: str | dict[str, Any]) -> Codec:
    """The codec that stands under a key; `module:Class` is imported, which registers it. Raises ConfigError."""
    try:
        name = given.get("codec") if isinstance(given, dict) else given
        if isinstance(name, str) and is_reference(name):
            made = import_function(name, f"split.{key}")
            own = str(getattr(made, "name", None))
            if CODECS.get(own) is not made:
                raise ConfigError(f"'{name}' is no codec: decorate its class with msfusion.codecs.register.")
            given = {**given, "codec": own} if isinstance(given, dict) else own
        return by_table(given)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{key}: {error}") from error


def _is_accuracy(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _checked_target(value: Any) -> Any:
    """An accuracy, or a list of them as a tuple."""
    each = value if isinstance(value, list | tuple) else [value]
    if value is not None and not (each and all(_is_accuracy(one) for one in each)):
        raise ValueError("should be a number greater than 0 and at most 1, or a list of such numbers")
    return tuple(float(one) for one in value) if isinstance(value, list | tuple) else value


class EvaluationSection(Section):
    """When the fused model is tested, and on how many examples at once."""

    metrics: Annotated[tuple[str, ...], BeforeValidator(_known_metrics)] = Field(
        default=(), description="further figures: of torchmetrics, or module:function of (outputs, targets)"
    )
    every: int = Field(
        default=1, ge=1, description="rounds between evaluations; the last round always has one"
    )
    batch_size: int = Field(default=256, ge=1)
    own_labels: bool = Field(
        default=False,
        description="for method.name = 'fedgrow': also what models are worth to participants, in their own proportions "
        "of labels",
    )
    target_accuracy: Annotated[float | tuple[float, ...] | None, BeforeValidator(_checked_target)] = Field(
        default=None, description="one or several; what it took to reach them is reported"
    )

    @property
    def targets(self) -> tuple[float, ...]:
        """The accuracies whose first round is reported."""
        target = self.target_accuracy
        return target if isinstance(target, tuple) else () if target is None else (target,)


class RunSection(Section):
    """How the run is carried out."""

    workers: int = Field(
        default=1, ge=1, le=1024, description="processes; the results are the same for any number"
    )
    threads: int = Field(default=1, ge=1, le=1024, description="of each worker")
    together: int = Field(
        default=1,
        ge=1,
        description="participants that a worker trains at once, stacked; same results but for rounding",
    )
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where participants train")
    engine: str | None = Field(
        default=None,
        description="who carries out the rounds: module:Class, made without arguments; by default so many workers on "
        "this machine. The results are the same for any",
    )
    checkpoint_every: int = Field(default=1, ge=1, description="rounds between checkpoints")


class ComparisonSection(Section):
    """What `msfusion compare` runs with this configuration, where its options do not say otherwise."""

    methods: list[Annotated[str, BeforeValidator(_known_method)]] = Field(
        default=[], description="the first one leads"
    )
    seeds: int = Field(default=3, ge=1, le=1000)
    ratios: list[float] = Field(default=[], description="width ratios for all participants")
    equal: Literal["rounds", "flops"] = Field(
        default="rounds", description="what fedavg has equal to the rest"
    )
    variants: dict[str, dict[str, Any]] = Field(
        default={}, description="by name, changes to this configuration; each method is run under each"
    )
