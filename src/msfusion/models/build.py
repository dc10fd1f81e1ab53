"""`build_model`: from settings to a model whose sizes fit the data."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import UnionType
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints, runtime_checkable

from torch import nn

from msfusion.batch import Batch
from msfusion.errors import ConfigError
from msfusion.imports import failing_as, import_function, in_one_line, is_reference
from msfusion.models.convolutional import ConvNet, ResNet
from msfusion.models.dense import MLP
from msfusion.models.huggingface import build_transformers, is_transformers
from msfusion.models.spec import ModelSpec
from msfusion.models.transformer import DecoderLM, TextClassifier
from msfusion.quoting import quoted
from msfusion.seeds import seeded
from msfusion.untrusted import require_room, require_sane

BUILT_IN: dict[str, type[nn.Module]] = {
    "resnet": ResNet,
    "convnet": ConvNet,
    "mlp": MLP,
    "text_classifier": TextClassifier,
    "decoder_lm": DecoderLM,
}


@runtime_checkable
class TrainingData(Protocol):
    """What of the data a model depends on (`msfusion.data.FederatedData` has it)."""

    @property
    def task(self) -> str:
        """`classification` or `language_modelling`."""

    @property
    def classes(self) -> int:
        """Labels, or tokens of the vocabulary."""

    @property
    def test(self) -> Batch:
        """Examples, for the shapes of inputs."""

    @property
    def vocabulary_size(self) -> int | None:
        """Tokens of the vocabulary; None unless inputs are text."""

    @property
    def padding(self) -> int | None:
        """The id of padding, if any."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """All tokens by their id, where the vocabulary was made of the training texts; else empty."""

    @property
    def tokenizer(self) -> str | None:
        """The tokenizer that made the ids (`words`, `transformers:FOLDER`), where it is known."""

    @property
    def masked(self) -> bool:
        """Whether masked tokens are predicted rather than the next."""


def build_model(spec: ModelSpec, data: TrainingData | None = None) -> nn.Module:
    """The model that the settings name, with seeded random weights (or those of its folder).

    Sizes that the options leave open are taken from the data, where the builder takes them by these names:
    `classes`, `in_channels`, `image_size`, `in_features` (numbers an example), `vocabulary_size`, `block_length`
    (tokens an example), `padding`.
    A `module:function` gets those that its signature names, and the options.
    Raises ConfigError for an unknown model or option, a missing or impossible size, or a model that does not
    fit the data's task.
    """
    sizes = sizes_of(data)
    with seeded(spec.seed):
        if spec.name in BUILT_IN:
            return _built_in(spec, sizes, data)
        if is_transformers(spec.name):
            return build_transformers(spec, sizes)
        if is_reference(spec.name):
            return _from_function(spec, sizes)
    raise ConfigError(
        f"model.name = '{spec.name}' must be one of {', '.join(BUILT_IN)}, transformers:TYPE, a folder "
        "with a "
        f"config.json, or module:function."
    )


def sizes_of(data: TrainingData | None) -> dict[str, Any]:
    """The sizes of a model that depend on the data, by the names under which builders take them."""
    if data is None:
        return {}
    inputs = data.test.inputs
    first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0]
    sizes: dict[str, Any] = {"task": data.task, "classes": data.classes, "masked": data.masked}
    if data.vocabulary_size is not None:
        sizes |= {"vocabulary_size": data.vocabulary_size, "block_length": int(first.shape[1])}
        sizes |= {} if data.padding is None else {"padding": data.padding}
        sizes |= {"tokens": data.tokens, "tokenizer": data.tokenizer}
        return sizes
    if first.ndim == 4:
        sizes |= {"in_channels": int(first.shape[1]), "image_size": tuple(map(int, first.shape[2:]))}
    return sizes | {"in_features": math.prod(first.shape[1:])}


def full_options(spec: ModelSpec, data: TrainingData) -> dict[str, Any]:
    """The options with which `build_model` makes a model of ours or a `module:function`'s without knowing the data."""
    builder = BUILT_IN.get(spec.name) or import_function(spec.name, "model.name")
    return _arguments(builder, spec, sizes_of(data))


def _arguments(builder: Callable[..., Any], spec: ModelSpec, sizes: Mapping[str, Any]) -> dict[str, Any]:
    taken = inspect.signature(builder).parameters
    return {name: sizes[name] for name in taken if name in sizes} | dict(spec.options)


def _built_in(spec: ModelSpec, sizes: Mapping[str, Any], data: TrainingData | None) -> nn.Module:
    builder = BUILT_IN[spec.name]
    _require_random(spec)
    if data is not None:
        _require_fit(spec.name, data)
    known = list(inspect.signature(builder).parameters)
    unknown = sorted(set(spec.options) - set(known))
    if unknown:
        raise ConfigError(
            f"model.options has {', '.join(unknown)}, unknown to {spec.name}; it takes {', '.join(known)}."
        )
    arguments = _arguments(builder, spec, sizes)
    for name in ("classes", "vocabulary_size"):
        given = spec.options.get(name)  # of another type: `_checked` says so
        if isinstance(given, int | float) and name in sizes and given < sizes[name]:
            raise ConfigError(f"model.options.{name} = {given} is less than the data's {sizes[name]}.")
    missing = [
        name for name, parameter in inspect.signature(builder).parameters.items()
        if parameter.default is parameter.empty and name not in arguments
    ]  # fmt: skip
    if missing:
        raise ConfigError(
            f"model.options needs {', '.join(missing)} for {spec.name}, as this data does not say."
        )
    return _checked(builder, arguments)


def _kind_of_inputs(data: TrainingData) -> str:
    if data.vocabulary_size is not None:
        return "text"
    inputs = data.test.inputs
    first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0]
    return "images" if first.ndim == 4 else "numbers"


def _checked(builder: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """Call a builder of ours with options of the types that it declares, converted where TOML has no such
    type.
    """
    types, declared = get_type_hints(builder.__init__), inspect.signature(builder).parameters
    checked = {}
    for name, value in arguments.items():
        try:
            checked[name] = _converted(value, types[name])
        except ValueError as error:
            kind = declared[name].annotation
            raise ConfigError(f"model.options.{name} = {quoted(value)} should be {kind}.") from error
    require_sane(checked, "model.options")
    try:
        require_room(lambda: builder(**checked), "the model")
        return builder(**checked)
    except (RuntimeError, MemoryError, OverflowError) as error:  # of sizes that no memory holds
        raise ConfigError(
            f"model.options: a model of these sizes cannot be built here: {in_one_line(error)}."
        ) from error


def _converted(value: Any, kind: Any) -> Any:
    """A value as a builder's type: a list for a tuple, a whole number for a float or the other way round.

    Raises ValueError for what is of another type.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for each in parts:
            with suppress(ValueError):
                return _converted(value, each)
    elif origin is not None:  # a sequence, or a tuple of so many
        if isinstance(value, list | tuple) and (origin is not tuple or len(value) == len(parts)):
            return tuple(_converted(each, parts[0]) for each in value)
    elif type(value) is kind:
        return value
    elif (kind is float and type(value) is int) or (
        kind is int and type(value) is float and value.is_integer()
    ):
        return kind(value)
    raise ValueError


def _require_random(spec: ModelSpec) -> None:
    if spec.weights != "random":
        raise ConfigError(
            f"model.weights = '{spec.weights}' needs a folder of transformers; {spec.name} starts at random."
        )


def _require_fit(name: str, data: TrainingData) -> None:
    """Raise ConfigError when a built-in model is asked to learn what it cannot."""
    fitting = {
        "text": ("decoder_lm",) if data.task == "language_modelling" else ("text_classifier",),
        "images": ("resnet", "convnet", "mlp"),
        "numbers": ("mlp",),
    }
    kind = _kind_of_inputs(data)
    if name not in fitting[kind]:
        raise ConfigError(
            f"model.name = '{name}' does not fit data of {kind} for {data.task.replace('_', ' ')}: take "
            f"{' or '.join(fitting[kind])}."
        )
    if name == "decoder_lm" and data.masked:
        raise ConfigError("model.name = 'decoder_lm' predicts next tokens: set data.mask_share to 0.")


def _from_function(spec: ModelSpec, sizes: Mapping[str, Any]) -> nn.Module:
    _require_random(spec)
    function = import_function(spec.name, "model.name")
    taken = inspect.signature(function).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    unknown = sorted(set(spec.options) - set(taken))
    if unknown and not open_ended:
        raise ConfigError(
            f"model.options has {', '.join(unknown)}, unknown to {spec.name}; it takes "
            f"{', '.join(taken) or 'nothing'}."
        )
    arguments = _arguments(function, spec, sizes)
    with failing_as(ConfigError, f"model.name = '{spec.name}'"):
        model = function(**arguments)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model.name = '{spec.name}' returned {type(model).__name__} instead of a torch.nn.Module."
        )
    return _unwrapped(model, spec.name)


def _unwrapped(model: nn.Module, name: str) -> nn.Module:
    """The model without what only says how it is run: nn.DataParallel, torch.compile."""
    while isinstance(model, nn.DataParallel) or "_orig_mod" in model._modules:  # as torch.compile calls it
        inner = model.module if isinstance(model, nn.DataParallel) else model._modules["_orig_mod"]
        assert inner is not None
        logging.getLogger("msfusion").warning(
            "msfusion: model.name = '%s': %s is left out, the model in it is trained.",
            name,
            type(model).__name__,
        )
        model = inner
    return model
