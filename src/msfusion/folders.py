"""Models in folders that `save_pretrained` of transformers wrote: loaded whole or not at all, and told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from msfusion.errors import ConfigError, GrowthError
from msfusion.extras import needing
from msfusion.imports import in_one_line

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
)
"""One of these is in each folder that holds a tokenizer of transformers."""
VOCABULARY = "vocabulary.json"
"""Where a folder lists the tokens of a vocabulary that was made of training texts: a list of all by their id."""
PREFIX = "transformers:"
"""What the name of a model of transformers may start with, to tell it from others."""


def folder_of(name: str) -> Path:
    """The folder that a model's name in a configuration may stand for."""
    return Path(name.removeprefix(PREFIX)).expanduser()


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer as `save_pretrained` of transformers writes it."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(name: str) -> Any:
    """The tokenizer in a folder (or of that name on the Hub). Raises ConfigError where there is none."""
    with needing("transformers", "data.tokenizer = 'transformers:...'"):
        from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(str(Path(name).expanduser()), trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds, ImportError and OSError among them
        raise ConfigError(
            f"data.tokenizer: {name} holds no tokenizer that can be loaded ({why(error)})."
        ) from error


def why(error: Exception) -> str:
    """What an error of transformers says, in one line, and in our words where it asks whether to run code."""
    if "trust_remote_code" in str(error) or "custom code" in str(error):
        return "it needs code of its own (auto_map), which is never run"
    return in_one_line(error)


def load_whole(architecture: Any, folder: Path, config: Any, **settings: Any) -> nn.Module:
    """The model of an architecture of transformers, all of it from the weights in a folder; safetensors only.

    Raises GrowthError, naming tensors, where some are missing, have another shape, or have no place in the model. Heads
    of other tasks, and poolers, may lie there unused.
    """
    with _quiet():  # what it would print is what the error says
        model, report = architecture.from_pretrained(
            str(folder),
            config=config,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
        )
    if flaws := _flaws(model, report):
        raise GrowthError(
            f"the weights in {folder} are not those of the {type(model).__name__} that is asked for: {flaws}"
        )
    loaded: nn.Module = model
    return loaded


def _flaws(model: nn.Module, report: Mapping[str, Any]) -> str:
    """What stands in the way of taking the folder for the model; nothing where it is whole."""
    reshaped = {name: (tuple(there), tuple(here)) for name, there, here in report["mismatched_keys"]}
    shapes = [
        f"{name!r} ({there} there, {here} asked for)" for name, (there, here) in sorted(reshaped.items())
    ]
    parts = {
        "missing": [repr(name) for name in sorted(set(report["missing_keys"]) - set(reshaped))],
        "of another shape": shapes,
        "without a place in the model": [
            repr(name) for name in sorted(report["unexpected_keys"]) if _in_backbone(model, name)
        ],
    }
    return "; ".join(_told(what, found) for what, found in parts.items() if found)


def _told(what: str, found: Sequence[str]) -> str:
    return (
        f"1 tensor is {what}: {found[0]}"
        if len(found) == 1
        else f"{len(found)} tensors are {what}, such as {found[0]}"
    )


def _in_backbone(model: nn.Module, name: str) -> bool:
    """Whether a tensor belongs to the part that all heads share; folders of models without a head have no prefix."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    first = name.partition(".")[0]
    inside = name.startswith(prefix) or hasattr(getattr(model, "base_model", model), first)
    return inside and "pooler" not in name.split(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bar and the warnings of transformers."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    before, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if shown:
            logging.enable_progress_bar()


def digest_of(folder: Path) -> str:
    """Equal for folders with the same configuration and weights."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        if path.is_file():
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:32]
