"""What data to load and how to share it out: the settings of `load_data`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msfusion.errors import ConfigError
from msfusion.quoting import quoted

TASKS = ("classification", "language_modelling", "regression", "other")
"""What targets are: labels, tokens, numbers, or whatever a loss of the user's makes of them."""

TOKENIZERS = ("words", "spaces", "characters")
FOLDER = "transformers:"
"""What the name of a tokenizer in a folder starts with."""


@dataclass(frozen=True)
class DataSpec:
    """Which data, how it becomes tensors, and who gets what. Every field has a default; see `load_data`.

    source: `digits`, `python-docs`, a folder or name of the Hugging Face Hub, a file (text, csv, json, parquet), or
    `module:function`.
    options: keyword arguments of that function. subset: the Hub's configuration name (`wikitext-2-raw-v1`).
    task: `classification`, `language_modelling`, `regression` (targets are numbers, one or several) or `other` (of a
    function: whatever the loss takes); by default the first where the data has a label column.
    input_column, label_column: by default found by type and usual names.
    train_split, test_split: names of splits; by default `train`, and `test` or else `validation`. Where there
    is no such split, `test_share` of the training split is held out (by default 0.2; of text 0.1).
    max_train, max_test: at most so many examples, drawn with the seed (language modelling: the first ones).

    tokenizer: `words` (words and punctuation marks, lower case), `spaces` (text that is tokenised already),
    `characters`, or `transformers:FOLDER`. vocabulary_size: the most frequent tokens kept. length: tokens an
    example.
    mask_share: the share of tokens to be masked and predicted (masked language modelling); 0 predicts the
    next token.

    normalise: images to mean 0, variance 1 per channel of the training set. image_size: resize to this many
    pixels square. channels: 1 (grey) or 3 (RGB); by default as the first image.

    partition: `iid`, `dirichlet`, `shards`, `column`, `contiguous`, or `flwr:NAME` (see
    `msfusion.data.partition`).
    partition_column: the column that `column` (or `dirichlet`, `shards` instead of the label) goes by.
    alpha: Dirichlet concentration; small is uneven. shards: shards a participant. min_examples: fewest a
    participant.
    partition_options: arguments of a `flwr:` partitioner.
    """

    source: str = "digits"
    options: Mapping[str, Any] = field(default_factory=dict)
    subset: str | None = None
    task: str | None = None
    input_column: str | None = None
    label_column: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    test_share: float | None = None
    max_train: int | None = None
    max_test: int | None = None

    tokenizer: str | None = None
    vocabulary_size: int = 8192
    length: int = 64
    mask_share: float = 0.0

    normalise: bool = True
    image_size: int | None = None
    channels: int | None = None

    participants: int = 10
    partition: str | None = None
    partition_column: str | None = None
    alpha: float = 0.5
    shards: int = 2
    min_examples: int = 1
    partition_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "max_train",
            "max_test",
            "length",
            "image_size",
            "participants",
            "shards",
            "min_examples",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name} = {quoted(value)} must be at least 1.")
        self._require(self.vocabulary_size >= 4, "vocabulary_size", "must be at least 4")
        self._require(0 <= self.seed < 2**63, "seed", "must be at least 0 and below 2^63")
        self._require((self.image_size or 1) <= 2**14, "image_size", "must be at most 16384 pixels")
        self._require(0 < self.alpha < float("inf"), "alpha", "must be a number above 0")
        self._require(
            self.test_share is None or 0 < self.test_share < 1, "test_share", "must be between 0 and 1"
        )
        self._require(0 <= self.mask_share < 1, "mask_share", "must be at least 0 and below 1")
        self._require(self.channels in (None, 1, 3), "channels", "must be 1 (grey) or 3 (RGB)")
        self._require(self.task is None or self.task in TASKS, "task", f"must be one of {', '.join(TASKS)}")
        known = self.tokenizer in (None, *TOKENIZERS) or is_pretrained(str(self.tokenizer))
        self._require(known, "tokenizer", f"must be one of {', '.join(TOKENIZERS)} or {FOLDER}FOLDER")

    def _require(self, fine: bool, name: str, demand: str) -> None:
        if not fine:
            raise ConfigError(f"data.{name} = {quoted(getattr(self, name))} {demand}.")


def is_pretrained(tokenizer: str) -> bool:
    """Whether this names a tokenizer in a folder, as `save_pretrained` of transformers writes it."""
    return tokenizer.startswith(FOLDER)
