"""Models of `transformers`: any configuration with random weights, or a local folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from msfusion.errors import ConfigError, MsfusionError
from msfusion.extras import needing
from msfusion.folders import PREFIX, VOCABULARY, folder_of, has_tokenizer, load_tokenizer, load_whole, why
from msfusion.models.spec import ModelSpec
from msfusion.untrusted import require_harmless, require_room, require_sane

HEADS = {
    "sequence_classification": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "image_classification": "AutoModelForImageClassification",
}


LABELLED = ("classification", "regression")
"""Tasks whose model has an output for each class, or for each number that is to be predicted."""


def is_transformers(name: str) -> bool:
    """Whether a model's name asks for `transformers`: by prefix, or as a folder with a config.json."""
    return name.startswith(PREFIX) or (folder_of(name) / "config.json").is_file()


def build_transformers(spec: ModelSpec, sizes: Mapping[str, Any]) -> nn.Module:
    """The model of a configuration (type, class, or folder) with the head that the task asks for.

    Sizes of the data (vocabulary, classes, channels, pixels, positions) are set where the configuration has
    them and the options do not; a folder's own vocabulary and positions are kept where they are large enough.
    Raises ConfigError without transformers; for an unknown type, folder, option or task; for weights that are
    missing; for a model too small for the data, or too large for this machine; for a folder that asks to run code;
    for weights that learnt other tokens than the data's. Raises GrowthError for weights = "whole" that are not.
    """
    with needing("transformers", f"model.name = '{spec.name}'"):
        import transformers
    target = spec.name.removeprefix(PREFIX)
    folder = folder_of(spec.name)
    task = spec.task or _guess_task(sizes)
    _require_fit(task, sizes)
    try:
        config = _folder_config(transformers, folder, spec, sizes) if _is_folder(target) else _new_config(
            transformers, target, spec, sizes
        )  # fmt: skip
        _require_room(config, sizes)
        head = getattr(transformers, HEADS[task])
        require_room(
            lambda: head.from_config(copy.deepcopy(config), trust_remote_code=False),
            f"the {config.model_type}",
        )
        if spec.weights != "random":
            return _pretrained(head, folder, config, spec)
        model: nn.Module = head.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except MsfusionError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise ConfigError(f"model.name = '{spec.name}' cannot be built for {task}: {why(error)}") from error
    return model


def _is_folder(target: str) -> bool:
    return "/" in target or (folder_of(target) / "config.json").is_file()


def _guess_task(sizes: Mapping[str, Any]) -> str:
    if not sizes:
        raise ConfigError(f"model.task must be one of {', '.join(HEADS)}, as there is no data to tell it by.")
    if sizes["task"] == "language_modelling":
        return "masked_lm" if sizes["masked"] else "causal_lm"
    return "sequence_classification" if "vocabulary_size" in sizes else "image_classification"


def _require_fit(task: str, sizes: Mapping[str, Any]) -> None:
    if not sizes or task == _guess_task(sizes):
        return
    hint = (
        "set data.mask_share to 0.15 or so"
        if task == "masked_lm"
        else f"the data is for {_guess_task(sizes)}"
    )
    raise ConfigError(f"model.task = '{task}' does not fit the data: {hint}.")


def _new_config(transformers: Any, target: str, spec: ModelSpec, sizes: Mapping[str, Any]) -> Any:
    """A configuration by type (`bert`) or class (`BertConfig`), with the data's sizes and the options."""
    if spec.weights != "random":
        raise ConfigError(
            f"model.weights = '{spec.weights}' needs a folder, and '{target}' is a type of model."
        )
    config_class = getattr(transformers, target, None) if target.endswith("Config") else None
    model_type = getattr(config_class, "model_type", None) or target
    if model_type not in transformers.CONFIG_MAPPING:
        import difflib

        close = difflib.get_close_matches(target, list(transformers.CONFIG_MAPPING.keys()), n=5)
        hint = f"; did you mean {', '.join(close)}?" if close else "."
        raise ConfigError(f"model.name: transformers knows no model type '{target}'{hint}")
    require_sane(spec.options, "model.options")
    default = transformers.AutoConfig.for_model(model_type)
    _require_known(default, spec)
    ours = _fitting(default, sizes)
    own_names = getattr(default, "attribute_map", {})  # GPT-2's n_positions is max_position_embeddings
    ours = {name: value for name, value in ours.items() if own_names.get(name) not in spec.options}
    return transformers.AutoConfig.for_model(model_type, **(ours | dict(spec.options)))


def _folder_config(transformers: Any, folder: Path, spec: ModelSpec, sizes: Mapping[str, Any]) -> Any:
    """The configuration in a folder, with the options on top and as many classes as the data."""
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model.name = '{spec.name}': there is no config.json in {folder} (seen from {Path.cwd()})."
        )
    require_harmless(folder)
    _require_same_tokens(folder, spec, sizes)
    stored = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    _require_known(stored, spec)
    require_sane(spec.options, "model.options")
    changes: dict[str, Any] = {"use_cache": False} if hasattr(stored, "use_cache") else {}
    if sizes.get("task") in LABELLED:
        changes["num_labels"] = sizes["classes"]
        changes |= _padding(stored, spec, sizes)
    settings = changes | dict(spec.options)
    return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False, **settings)


def _padding(stored: Any, spec: ModelSpec, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The data's padding token, by which decoders find the end of a text, in place of the folder's."""
    if "padding" not in sizes or "pad_token_id" in spec.options:
        return {}
    known, ours = getattr(stored, "pad_token_id", None), sizes["padding"]
    if known is not None and known != ours and spec.weights != "random":
        raise ConfigError(
            f"the model's pad_token_id = {known} differs from the data's padding token {ours}: give both the same, in "
            "config.json or by the pad_token of the tokenizer."
        )
    return {"pad_token_id": ours}


def _require_same_tokens(folder: Path, spec: ModelSpec, data: Mapping[str, Any]) -> None:
    """Raise ConfigError where trained weights would meet token ids that mean something else than they learnt."""
    if spec.weights == "random":
        return
    if data.get("tokens"):  # a vocabulary made of the training texts
        listed = folder / VOCABULARY
        if listed.is_file() and _json(listed) == list(data["tokens"]):
            return
        remedy = (
            f"set data.tokenizer = '{PREFIX}{folder}', or leave it out"
            if has_tokenizer(folder)
            else "save its tokenizer there (tokenizer.save_pretrained), or start with model.weights = 'random'"
        )
        raise ConfigError(
            f"model.weights = '{spec.weights}': the model in {folder} learnt other token ids than those of the "
            f"vocabulary that was made of these training texts: {remedy}."
        )
    used = data.get("tokenizer")
    if used is None or not has_tokenizer(folder) or folder_of(used) == folder:
        return
    if load_tokenizer(used.removeprefix(PREFIX)).get_vocab() != load_tokenizer(str(folder)).get_vocab():
        raise ConfigError(
            f"model.weights = '{spec.weights}': data.tokenizer = '{used}' has other tokens than the tokenizer in "
            f"{folder}, with which the model learnt: leave data.tokenizer out."
        )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON text ({type(error).__name__}).") from error


def _fitting(default: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The data's sizes under the names of this configuration."""
    wanted: dict[str, Any] = {"use_cache": False}
    if "vocabulary_size" in sizes:
        wanted |= {
            "vocab_size": sizes["vocabulary_size"],
            "max_position_embeddings": _positions(default, sizes),
        }
        wanted |= {name: sizes.get("padding") for name in ("pad_token_id",)}
        # the defaults are ids of the vocabulary that the published model had
        wanted |= {name: None for name in ("bos_token_id", "eos_token_id") if hasattr(default, name)}
    if "image_size" in sizes:
        height, width = sizes["image_size"]
        wanted |= {
            "num_channels": sizes["in_channels"],
            "image_size": height if height == width else (height, width),
        }
    fitting = {name: value for name, value in wanted.items() if hasattr(default, name)}
    if sizes.get("task") in LABELLED:
        fitting["num_labels"] = sizes["classes"]
    return fitting


def _positions(default: Any, sizes: Mapping[str, Any]) -> int:
    """Positions to embed: RoBERTa and its kin count them from padding + 1."""
    offset = (sizes.get("padding") or 0) + 1 if "roberta" in default.model_type else 0
    return int(sizes["block_length"]) + offset


def _require_known(config: Any, spec: ModelSpec) -> None:
    known = (
        set(config.to_dict())
        | set(getattr(config, "attribute_map", {}))
        | {"num_labels", "attn_implementation"}
    )
    unknown = sorted(set(spec.options) - known)
    if unknown:
        raise ConfigError(
            f"model.options has {', '.join(unknown)}, unknown to {type(config).__name__}; it takes "
            f"{', '.join(sorted(name for name in known if not name.startswith('_')))}."
        )


def _require_room(config: Any, sizes: Mapping[str, Any]) -> None:
    """Raise ConfigError when the data has more tokens, classes, or longer examples, than the model."""
    hints = {
        "vocab_size": "use the model's own tokenizer (data.tokenizer = 'transformers:FOLDER'), or give the model "
        "embeddings for all of its tokens (resize_token_embeddings)",
        "max_position_embeddings": "lower data.length",
        "num_labels": "raise it",
    }
    kinds = {"vocab_size": "vocabulary_size", "max_position_embeddings": "block_length"}
    if sizes.get("task") == "classification":
        kinds["num_labels"] = "classes"
    for name, size in kinds.items():
        room = getattr(config, name, None)
        if isinstance(room, int) and size in sizes and room < sizes[size]:
            known_as = size.replace("_", " ")
            raise ConfigError(
                f"the model's {name} = {room} is less than the data's {known_as} {sizes[size]}: "
                f"{hints[name]}."
            )
    channels = getattr(config, "num_channels", None)
    if "in_channels" in sizes and isinstance(channels, int) and channels != sizes["in_channels"]:
        raise ConfigError(
            f"the model's num_channels = {channels} differs from the images' {sizes['in_channels']}: "
            f"set data.channels to {channels}."
        )


def _pretrained(head: Any, folder: Path, config: Any, spec: ModelSpec) -> nn.Module:
    """The folder's weights, from safetensors only: a pickle could run anything."""
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"model.weights = '{spec.weights}': there are no .safetensors weights in {folder}.")
    if spec.weights == "whole":
        return load_whole(head, folder, config, dtype=torch.float32)
    model: nn.Module = head.from_pretrained(
        str(folder),
        config=config,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
    )
    return model
