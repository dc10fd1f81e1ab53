"""What growth needs to know of models of `transformers`: folders, configurations, example inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msfusion.errors import GrowthError, UntraceableModelError
from msfusion.extras import needing
from msfusion.folders import load_whole, why
from msfusion.imports import in_one_line
from msfusion.untrusted import require_harmless, require_room, require_sane
from msfusion.width.groups import WidthMap
from msfusion.width.trace import trace

Inputs = tuple[Any, ...] | dict[str, Any]


def load_folder(folder: str | Path) -> nn.Module:
    """The model in a folder that `save_pretrained` wrote: safetensors only, because a pickle could run anything.

    Raises GrowthError where there is none, or where its weights are not those of its configuration.
    """
    with needing("transformers", f"growing from {folder}", GrowthError):
        import transformers
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise GrowthError(f"there is no config.json in {path}: give a folder that save_pretrained wrote")
    if not any(path.glob("*.safetensors")):
        raise GrowthError(f"there are no .safetensors weights in {path}: save the model with save_pretrained")
    try:
        require_harmless(path)
        config = transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=False)
        names = getattr(config, "architectures", None) or ["none"]
        architecture = getattr(transformers, str(names[0]), None)
        if not (isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)):
            raise GrowthError(
                f"transformers has no architecture {names[0]!r}, which {path}/config.json names"
            )
        require_room(lambda: architecture(copy.deepcopy(config)), f"the model in {path}")
        return load_whole(architecture, path, config)
    except GrowthError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise GrowthError(f"the model in {path} cannot be loaded: {why(error)}") from error


def build_target(source: nn.Module, target: Any) -> nn.Module:
    """The target model: a module as it is; a configuration, or changes to the source's, in the source's architecture.

    Raises GrowthError for a configuration of another family, an unknown setting, or sizes that do not fit together.
    """
    if isinstance(target, nn.Module):
        return target
    config = getattr(source, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise GrowthError(
            f"{type(source).__name__} is no model of transformers: give the target as a model, not a configuration"
        )
    if isinstance(target, Mapping):
        target = _changed(config, target)
    if getattr(target, "model_type", None) != config.model_type:
        raise GrowthError(
            f"the families differ: the source is a {config.model_type} and the target a "
            f"{getattr(target, 'model_type', type(target).__name__)}; a model grows within its family"
        )
    try:
        require_sane(target.to_dict(), "the target's configuration")
        require_room(lambda: type(source)(copy.deepcopy(target)), "the target")
        model: nn.Module = type(source)(copy.deepcopy(target))
    except Exception as error:  # transformers raises many kinds
        raise GrowthError(f"the target's configuration cannot be built: {in_one_line(error)}") from error
    for name, _ in [*model.named_children()]:
        if getattr(source, name, model) is None:  # as add_pooling_layer=False, which no configuration knows
            setattr(model, name, None)
    return model.to(next(source.parameters()).dtype)


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy of a configuration with some settings changed."""
    changed = copy.deepcopy(config)
    for name, value in changes.items():
        if not hasattr(changed, name):
            raise GrowthError(f"the configuration of a {config.model_type} has no setting {name!r}")
        try:
            setattr(changed, name, value)
        except Exception as error:  # transformers raises many kinds
            raise GrowthError(
                f"the setting {name!r} of a {config.model_type} cannot be {value!r}: {in_one_line(error)}"
            ) from error
    kinds = getattr(changed, "layer_types", None)
    if kinds and "layer_types" not in changes and len(kinds) != changed.num_hidden_layers:
        # it was derived from the number of layers, which is another now
        settings = {name: value for name, value in changed.to_dict().items() if name != "layer_types"}
        changed = type(config).from_dict(settings)
    return changed


def example_inputs_for(model: nn.Module) -> dict[str, Tensor]:
    """Inputs with which a model of `transformers` can be traced: two short texts, or two images.

    Raises GrowthError where it is not known how to call the model.
    """
    name = getattr(model, "main_input_name", None)
    config: Any = getattr(model, "config", None)
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids" and hasattr(config, "vocab_size"):
        time = min(8, getattr(config, "max_position_embeddings", 8))
        return {"input_ids": torch.randint(0, config.vocab_size, (2, time), generator=generator)}
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(2, config.num_channels, height, width, generator=generator)}
    raise GrowthError(f"it is not known how to call a {type(model).__name__}: give grow its example_inputs")


def traced(model: nn.Module, inputs: Inputs | None) -> WidthMap:
    """The width map of a model; for one of `transformers`, inputs are made where there are none.

    Raises as `trace` and `example_inputs_for` do.
    """
    try:
        with _without_cache(model):
            return trace(model, example_inputs_for(model) if inputs is None else inputs)
    except UntraceableModelError as error:
        if "no padding token" not in str(error):
            raise
        raise UntraceableModelError(
            f"{type(model).__name__} finds the end of a text by its padding, and its configuration says none: set "
            "pad_token_id there"
        ) from error


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A model of `transformers` without its cache of keys and values, which tracing cannot follow."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if before:
        config.use_cache = False
    try:
        yield
    finally:
        if before:
            config.use_cache = before
