"""The tables of a configuration: their keys, types, defaults, and what each value may be."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, create_model

from msfusion.averaging.robust import AVERAGES, Average
from msfusion.data.spec import OWN_DATA, DataSpec, names_own_data
from msfusion.experiment.config.codecs import as_now, codec_of
from msfusion.experiment.config.declared import Section, key_of, keys_of, section_of
from msfusion.federated.accounting import Privacy
from msfusion.federated.participation import RoundSettings
from msfusion.federated.problem import METHODS
from msfusion.federated.screening import Screening
from msfusion.federated.secure_sums import SecureSums
from msfusion.federated.training import TrainingSettings
from msfusion.imports import is_reference
from msfusion.methods import HOUSE
from msfusion.methods.narrow import Weighting
from msfusion.methods.parts.contrastive import ContrastiveSettings
from msfusion.methods.split.method import Clients, ServerStep, SplitSettings
from msfusion.methods.split.wire import Derivative
from msfusion.methods.starts import StartOrAuto
from msfusion.models.spec import ModelSpec
from msfusion.scoring import LOSSES, METRICS, TORCH_METRICS
from msfusion.windows.overlap import Feedback, Overlap, OverlapShape

SLICES_ONLY = (
    "participants.budget",
    "participants.minimum_ratio",
    "method.overlap",
    "method.between_rounds",
    "method.start",
    "method.grow_at",
    "method.apart",
    "method.recalibrate",
    "method.average",
    "method.contrastive_weight",
    "run.together",
    "network",
    "training.loss",
    "evaluation.metrics",
)
"""What is for sub-models alone: keys that must stay as they are by default elsewhere."""

CODECS = ("method.codec", "method.codec_down")
"""What makes the messages of a round small: not where a method of the house has messages of its own kind."""

SECURE = ("method.secure", "method.privacy")
"""What keeps single updates to the participants: not where a method of the house needs them."""


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


def _known_own(value: Any) -> Any:
    """Where participants have data of their own, a list as a tuple: TOML has none."""
    if value is not None and not names_own_data(value):
        raise ValueError(f"should be {OWN_DATA}")
    return tuple(value) if isinstance(value, list) else value


def _known_columns(value: Any) -> Any:
    """The name of a column, or names, a list as a tuple: TOML has none."""
    names = value if isinstance(value, list | tuple) else [value]
    if value is not None and not (names and all(isinstance(name, str) for name in names)):
        raise ValueError("should be the name of a column, or a list of names")
    return tuple(value) if isinstance(value, list) else value


if TYPE_CHECKING:

    class DataSection(Section):
        """The keys of DataSpec."""

        source: str = "digits"
        own: str | tuple[str | int, ...] | None = None
        task: str | None = None
        input_column: str | tuple[str, ...] | None = None
        normalise_targets: bool = True

    class ModelSection(Section):
        """The keys of ModelSpec."""

    class LocalTrainingSection(Section):
        """The keys of TrainingSettings."""

    class TrainingSection(LocalTrainingSection):
        """With the loss."""

        loss: str = "cross_entropy"
else:
    DataSection = section_of(
        DataSpec,
        without=("participants", "seed", "scale_of"),
        read_as={
            "own": Annotated[str | tuple[str | int, ...] | None, BeforeValidator(_known_own)],
            "input_column": Annotated[str | tuple[str, ...] | None, BeforeValidator(_known_columns)],
        },
    )
    ModelSection = section_of(ModelSpec, without=("seed",))
    LocalTrainingSection = section_of(TrainingSettings, without=("rounds",))
    TrainingSection = create_model(
        "TrainingSection",
        __base__=LocalTrainingSection,
        loss=(
            Annotated[str, BeforeValidator(_known_loss)],
            Field(
                default="cross_entropy",
                description=f"what participants minimise: cross_entropy, {', '.join(LOSSES)}, or module:function",
            ),
        ),
    )


_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _checked_bytes(value: Any) -> Any:
    """A number of bytes, from a text such as "64 MB" or "64000" too."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"([0-9]+(?:[.][0-9]+)?) *([A-Za-z]*)", value.strip())
    unit = None if found is None else _UNITS.get(found[2] or "B")
    if found is None or unit is None:
        raise ValueError(f"should be a number of bytes, with or without a unit ({', '.join(_UNITS)})")
    return round(Fraction(found[1]) * unit)  # of a float, a long number would be infinite


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

    shape: OverlapShape | Literal["feedback"] = key_of(Overlap, "shape")
    start: float = key_of(Overlap, "start", default=...)
    end: float | None = key_of(Overlap, "end", default=None)
    target: float = key_of(Feedback, "target")
    gain: float = key_of(Feedback, "gain")


class SecureSection(Section):
    """The server learns the sum of a round's updates alone. `secure = true` is a table with the defaults."""

    minimum: int = key_of(SecureSums, "minimum")


class PrivacySection(Section):
    """Participants' changes are cut down and have noise: differential privacy for each participant."""

    clip: float = key_of(Privacy, "clip")
    noise: float = key_of(Privacy, "noise")
    delta: float = key_of(Privacy, "delta")


def _true_as_table(value: Any) -> Any:
    """`secure = true` is an empty table, `secure = false` none."""
    return ({} if value else None) if isinstance(value, bool) else value


def _known_method(value: Any) -> Any:
    """The name of a method, or of a class of the user's."""
    if isinstance(value, str) and value not in METHODS and not is_reference(value):
        raise ValueError(f"should be {', '.join(map(repr, HOUSE))}, or module:Class")
    return value


def _keys_of_methods() -> dict[str, Any]:
    """What can be set of the methods of the house, and of every method."""
    keys: dict[str, Any] = {"name": (Annotated[str, BeforeValidator(_known_method)], _METHOD_NAME)}
    for settings in (METHODS[name] for name in HOUSE):
        if settings.own_table is None:
            keys |= keys_of(settings, without=("name", "ratio", "contrastive"), read_as=_READ_AS)
    keys |= keys_of(ContrastiveSettings, prefix="contrastive_")
    return {**keys, **_CODECS, **_SECURE, **keys_of(Screening, without=("max_examples",))}


_CodecKey = Annotated[str | dict[str, Any], BeforeValidator(as_now)]
_CODECS = {
    "codec": (
        _CodecKey | None,
        Field(
            default=None,
            description="a codec for what participants send: a profile, or a table { codec = 'dead_zone', ... } "
            "with its settings; what it leaves out is sent in a later round. By default all is sent as it is",
        ),
    ),
    "codec_down": (
        _CodecKey | None,
        Field(
            default=None, description="the same for what participants are sent, as changes of what they know"
        ),
    ),
}
_SECURE = {
    "secure": (
        Annotated[SecureSection | None, BeforeValidator(_true_as_table)],
        Field(
            default=None,
            description="true: the server learns the sum of a round's updates, and no single one; or a table with",
        ),
    ),
    "privacy": (
        PrivacySection | None,
        Field(
            default=None,
            description="participants' changes are cut down and have noise (differential privacy); a table with",
        ),
    ),
}
_METHOD_NAME = Field(default="msfusion", description=f"{', '.join(HOUSE)}, or module:Class")
_READ_AS = {
    "average": Annotated[Average, BeforeValidator(_known_average)],
    "overlap": OverlapSection | None,
    "remembered_bytes": Bytes,
    "schedule": str,
}

if TYPE_CHECKING:

    class MethodSection(Section):
        """How the participants' work becomes one model: the fields of the methods' own dataclasses."""

        name: str = "msfusion"
        weighting: Weighting
        average: Average
        start: StartOrAuto
        codec: str | dict[str, Any] | None
        codec_down: str | dict[str, Any] | None
        secure: SecureSection | None
        privacy: PrivacySection | None
        overlap: OverlapSection | None
        schedule: str

        def __init__(self, **keys: Any) -> None: ...
else:
    MethodSection = create_model("MethodSection", __base__=Section, **_keys_of_methods())


def _true_as_text(value: Any) -> Any:
    """`derivative = true` without quotation marks is what `--set split.derivative=true` says."""
    return "true" if value is True else value


class SplitSection(Section):
    """Where split learning cuts the model, and how what crosses becomes bytes."""

    at: str = key_of(SplitSettings, "at")
    activations: _CodecKey = key_of(SplitSettings, "activations", default="compact")
    gradients: _CodecKey = key_of(SplitSettings, "gradients", default="scaled")
    server_step: ServerStep = key_of(SplitSettings, "server_step")
    clients: Clients = key_of(SplitSettings, "clients")
    derivative: Annotated[Derivative, BeforeValidator(_true_as_text)] = key_of(SplitSettings, "derivative")

    meaningless: ClassVar[tuple[str, ...]] = (
        *SLICES_ONLY,
        *CODECS,
        *SECURE,
        "method.weighting",
        "participants.fraction",
        "participants.dropout",
        "training.precision",
        "run.workers",
        "run.engine",
        "run.device",
    )
    """Other keys, which have no meaning for split learning (yet)."""

    @property
    def settings(self) -> SplitSettings:
        """What the engine takes. Raises ConfigError on an unknown codec or an impossible setting."""
        codecs: dict[str, Any] = {
            name: codec_of("split", name, getattr(self, name)) for name in ("activations", "gradients")
        }
        return self.made(SplitSettings, **codecs)


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
    every: int = key_of(RoundSettings, "evaluate_every")
    batch_size: int = Field(default=256, ge=1, description="examples that are evaluated at once")
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


SHARDED = "sharded"
"""The engine without a server, `experiment.sharded`, as `run.engine` names it."""


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
        description="who carries out the rounds: by default so many workers on this machine; sharded: processes that "
        "torchrun starts, each with a part of the model; or module:Class, made without arguments. The results are the "
        "same for any",
    )
    checkpoint_every: int = Field(default=1, ge=1, description="rounds between checkpoints")


class ComparisonSection(Section):
    """What `msfusion compare` runs with this configuration, where its options do not say otherwise."""

    methods: list[Annotated[str, BeforeValidator(_known_method)]] = Field(
        default=[], description="the first one leads"
    )
    seeds: int = Field(
        default=3, ge=1, le=1000, description="runs of each method, with this seed and the next ones"
    )
    ratios: list[float] = Field(default=[], description="width ratios for all participants")
    equal: Literal["rounds", "flops"] = Field(
        default="rounds", description="what fedavg has equal to the rest"
    )
    variants: dict[str, dict[str, Any]] = Field(
        default={}, description="by name, changes to this configuration; each method is run under each"
    )
