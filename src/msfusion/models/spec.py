"""Which model to build: the settings of `build_model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msfusion.setting import check, one_of, setting

TRANSFORMERS_TASKS = ("sequence_classification", "causal_lm", "masked_lm", "image_classification")
WEIGHTS = ("random", "pretrained", "whole")


@dataclass(frozen=True)
class ModelSpec:
    """Which model, with which options and weights.

    `transformers:TYPE` is a model type such as `bert`, or a configuration class such as `BertConfig`;
    `transformers:FOLDER` has a config.json as `save_pretrained` writes it. Raises ConfigError for impossible values.
    """

    name: str = setting(
        "resnet",
        "resnet, convnet, mlp, text_classifier, decoder_lm; transformers:TYPE; transformers:FOLDER; or module:function",
    )
    options: Mapping[str, Any] = setting(
        dict,
        "what the model's builder takes (widths, layers, ...); for transformers, fields of its configuration",
    )
    task: str | None = setting(
        None, "for transformers, which head; by default as the data asks", **one_of(TRANSFORMERS_TASKS)
    )
    weights: str = setting(
        "random",
        "random; of a folder that holds weights pretrained, where a head for other classes begins at random, or whole, "
        "where nothing may",
        **one_of(WEIGHTS),
    )
    seed: int = setting(0, "of the random weights", ge=0)

    def __post_init__(self) -> None:
        check(self, prefix="model.")
