"""Which model to build: the settings of `build_model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msfusion.errors import ConfigError
from msfusion.quoting import quoted

TRANSFORMERS_TASKS = ("sequence_classification", "causal_lm", "masked_lm", "image_classification")
WEIGHTS = ("random", "pretrained", "whole")


@dataclass(frozen=True)
class ModelSpec:
    """Which model, with which options and weights.

    name: `resnet`, `convnet`, `text_classifier`, `decoder_lm`; `transformers:TYPE` (a model type such as
    `bert`, or a configuration class such as `BertConfig`); `transformers:FOLDER` with a config.json as
    `save_pretrained` writes it; or `module:function`.
    options: what the model's builder takes (widths, layers, ...); for transformers, fields of its
    configuration.
    task: for transformers, which head; by default as the data asks.
    weights: `random`; for a folder that holds weights `pretrained`, where a head for other classes begins at
    random, or `whole`, where nothing may.
    seed: of the random weights.
    """

    name: str = "resnet"
    options: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    weights: str = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TRANSFORMERS_TASKS:
            raise ConfigError(
                f"model.task = {quoted(self.task)} must be one of {', '.join(TRANSFORMERS_TASKS)}."
            )
        if self.weights not in WEIGHTS:
            raise ConfigError(f"model.weights = {quoted(self.weights)} must be one of {', '.join(WEIGHTS)}.")
        if self.seed < 0:
            raise ConfigError(f"model.seed = {quoted(self.seed)} must not be negative.")
