"""Model folders by strangers: nothing in them is run, and nothing is built that this machine cannot hold."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from msfusion.errors import ConfigError
from msfusion.memory import machine_memory

MOST_PARTS = 10_000
"""Layers, heads or experts: more of them than any model has."""
MOST_MODULES = 200_000
MOST_BYTES = 16 * 2**20
"""Of a config.json: those of real models have a few thousand."""
_COUNTS = re.compile(r"(^|_)(layers?|depths?|heads?|experts|stages|blocks)$")


def require_harmless(folder: Path) -> None:
    """Check what `transformers` would act upon in a folder's config.json and beside it, before it is asked to.

    Raises ConfigError for code or weights that would be fetched from elsewhere, weights that are no safetensors,
    adapters, counts that no model has, and a config.json that is no JSON object.
    """
    config = _read(folder / "config.json")
    for key, value in _entries(config):
        _require_own_code(key, value, folder)
    require_sane(config, str(folder / "config.json"))
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{folder} holds an adapter (adapter_config.json), whose base model would come from elsewhere: merge it "
            "into its model first (merge_and_unload) and save that."
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = _read(index).get("weight_map")
        names = files.values() if isinstance(files, dict) else [files]
        odd = next((name for name in names if not _is_weights_file(name)), None)
        if odd is not None:
            raise ConfigError(
                f"{index} names weights that are no .safetensors file of this folder: {str(odd)[:100]!r}."
            )


def require_sane(settings: Mapping[str, Any], holder: str) -> None:
    """Raise ConfigError for counts of layers, heads or experts that no model has: they would only fill the memory."""
    for key, value in _entries(settings):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if whole and (value > 2**40 or (_COUNTS.search(key) and value > MOST_PARTS)):
            raise ConfigError(f"{key} = {value:.4g} in {holder} is more than any model has.")


def require_room(build: Callable[[], nn.Module], name: str) -> None:
    """Build a model on the meta device, which takes no memory, and count its parameters against this machine's memory.

    Raises ConfigError where one copy in float32 is more than this machine has, or there are more modules than in any
    model. Random generators stay as they are. What else goes wrong is left to the real construction.
    """
    if torch.get_default_device().type == "meta":
        return  # the real model takes no memory either
    seen: dict[int, Tensor] = {}
    elements = modules = 0

    def count_parameter(module: nn.Module, key: str, parameter: Tensor | None) -> None:
        nonlocal elements
        if parameter is not None and id(parameter) not in seen:
            seen[id(parameter)] = parameter
            elements += parameter.numel()
            if elements * 4 > machine_memory():
                raise ConfigError(
                    f"{name} would have more than {elements * 4 / 1e9:,.0f} GB of parameters, and this machine has "
                    f"{machine_memory() / 1e9:,.0f} GB of memory: make it smaller."
                )

    def count_module(module: nn.Module, key: str, submodule: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > MOST_MODULES:
            raise ConfigError(f"{name} would have more than {MOST_MODULES} modules: make it smaller.")

    hooks = [
        register_module_parameter_registration_hook(count_parameter),
        register_module_module_registration_hook(count_module),
    ]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is said when the model is really built
            build()
    except ConfigError:
        raise
    except Exception:  # a model that cannot be built there; the real one says why it cannot be built
        pass
    finally:
        for hook in hooks:
            hook.remove()


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path} has more than {MOST_BYTES} bytes: it is no configuration of a model.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is no JSON text ({type(error).__name__}).") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds no JSON object.")
    return value


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All keys and values that are no containers, at any depth; those in lists under the key of the list."""
    waiting = [(key, value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            yield key, None
            waiting += [(str(name), each) for name, each in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(key, each) for each in value]
        else:
            yield key, value


def _require_own_code(key: str, value: Any, folder: Path) -> None:
    """Raise ConfigError for settings that make `transformers` fetch code or weights from elsewhere."""
    if key.endswith("_implementation") and isinstance(value, str) and not re.fullmatch(r"\w+", value):
        raise ConfigError(
            f"{folder}/config.json names code of others for {key} ({value[:100]!r}), which is never run: take the "
            "setting out."
        )
    if key == "use_pretrained_backbone" and value:
        raise ConfigError(
            f"{folder}/config.json asks for weights from elsewhere (use_pretrained_backbone): set it to false."
        )


def _is_weights_file(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name
