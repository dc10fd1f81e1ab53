"""What data to load and how to share it out: the settings of `load_data`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msfusion.imports import is_reference
from msfusion.setting import check, one_of, setting

TASKS = ("classification", "language_modelling", "regression", "other")
"""What targets are: labels, tokens, numbers, or whatever a loss of the user's makes of them."""

TOKENIZERS = ("words", "spaces", "characters")
FOLDER = "transformers:"
"""What the name of a tokenizer in a folder starts with."""

OWN_DATA = (
    "a name with {participant} in it, or a list with a name (or a number of examples) for each participant"
)
MOST_ELSEWHERE = 10**9
"""More examples than that nobody has; to count up to a number without end would only fill the memory."""

PARTICIPANT = "{participant}"
"""What stands for a participant's number in the name of its own data."""

TEST_SEED = 0
"""What is held out as the test set is the same under every seed: runs are compared on the same examples, and one that
chooses settings by other examples (`validation_share`) never trains on those that another is tested on."""


@dataclass(frozen=True)
class DataSpec:
    """Which data, how it becomes tensors, and who gets what; see `load_data`. Raises ConfigError for impossible values.

    A language model's `length` and everything from `tokenizer` on are about text, `normalise` to `channels` about
    images (but for `normalise_targets`). Without a split of that name, `test_share` of the training split is held
    out. `validation_share` of what is left for training takes the place of the test set.
    """

    source: str = setting(
        "digits",
        "digits, python-docs, a folder or name of the Hugging Face Hub, a file (text, csv, json, parquet), or "
        "module:function",
    )
    options: Mapping[str, Any] = setting(dict, "keyword arguments of that function")
    own: str | tuple[str | int, ...] | None = setting(
        None,
        "where each participant has its own examples: a list of folders, files or module:function, or one name with "
        f"{PARTICIPANT} in it; a number is how many it has on another machine. The source then only says what labels, "
        "words and pixels mean, and has the test set",
        fits=lambda own: names_own_data(own),
        wanted=OWN_DATA,
    )
    subset: str | None = setting(None, "the Hub's name of a configuration, such as wikitext-2-raw-v1")
    task: str | None = setting(
        None,
        "classification, language_modelling, regression (targets are numbers) or other (whatever the loss takes); by "
        "default the first where the data has a label column",
        **one_of(TASKS),
    )
    input_column: str | tuple[str, ...] | None = setting(
        None,
        "by default found by type and usual names; a list of columns is a table, of numbers and words",
        fits=lambda columns: (
            isinstance(columns, str) or (isinstance(columns, list | tuple) and bool(columns))
        ),
        wanted="the name of a column, or a list of names",
    )
    label_column: str | None = setting(None, "by default found by type and usual names")
    train_split: str = setting("train", "the name of the split to train on")
    test_split: str | None = setting(
        None, "the name of the split to test on; by default test, or else validation"
    )
    test_share: float | None = setting(
        None,
        "of the training split, held out where there is no test split; by default 0.2, of text 0.1; the same examples "
        "under every seed",
        gt=0,
        lt=1,
    )
    max_train: int | None = setting(
        None, "at most so many examples, drawn with the seed (language modelling: the first ones)", ge=1
    )
    max_test: int | None = setting(None, "the same of the test split", ge=1)
    validation_share: float | None = setting(
        None,
        "of the training examples, to be tested on instead of the test set: to choose settings without a look at that",
        gt=0,
        lt=1,
    )

    tokenizer: str | None = setting(
        None,
        "words (and punctuation marks, lower case), spaces (text that is tokenised already), characters, or "
        f"{FOLDER}FOLDER",
        fits=lambda name: name in TOKENIZERS or is_pretrained(name),
        wanted=f"one of {', '.join(TOKENIZERS)} or {FOLDER}FOLDER",
    )
    vocabulary_size: int = setting(8192, "the most frequent tokens, which are kept", ge=4)
    length: int = setting(64, "tokens of an example", ge=1)
    mask_share: float = setting(
        0.0, "of the tokens, to be masked and predicted; 0 predicts the next token", ge=0, lt=1
    )

    normalise: bool = setting(
        True, "images to mean 0, variance 1 per channel of the training set; numbers of a table per column"
    )
    normalise_targets: bool = setting(
        True,
        "of a regression: numbers to predict to mean 0, variance 1 of the training set, for the loss; all figures and "
        "predictions are in their own units",
    )
    image_size: int | None = setting(None, "resize images to so many pixels square", ge=1, le=2**14)
    channels: int | None = setting(
        None,
        "of images; by default as the first one",
        fits=lambda channels: channels in (1, 3),
        wanted="1 (grey) or 3 (RGB)",
    )

    participants: int = setting(10, "how many share the data", ge=1)
    partition: str | None = setting(
        None,
        "iid, dirichlet, shards, column, contiguous, or flwr:NAME (msfusion.data.partition); by default iid, for "
        "running text contiguous, for digits, and where alpha or a column is given, dirichlet",
    )
    partition_column: str | None = setting(
        None, "what the partition column goes by (or dirichlet, shards instead of the label)"
    )
    alpha: float = setting(0.5, "the concentration of dirichlet; small is uneven", gt=0)
    shards: int = setting(2, "of a participant", ge=1)
    min_examples: int = setting(1, "the fewest that a participant gets", ge=1)
    partition_options: Mapping[str, Any] = setting(dict, "arguments of a partitioner of flwr:")
    seed: int = setting(0, "of every draw", ge=0, lt=2**63)
    scale_of: str | None = setting(
        None, "the folder of a trained model, on whose scale numbers are to be predicted"
    )

    def __post_init__(self) -> None:
        columns: object = self.input_column
        if isinstance(columns, list):
            object.__setattr__(self, "input_column", tuple(columns))
        check(self, prefix="data.")


def is_pretrained(tokenizer: str) -> bool:
    """Whether this names a tokenizer in a folder, as `save_pretrained` of transformers writes it."""
    return tokenizer.startswith(FOLDER)


def names_own_data(own: object) -> bool:
    """Whether this says of every participant where its data is, or how many examples it has elsewhere."""
    if isinstance(own, str):
        return PARTICIPANT in own or is_reference(own)
    return isinstance(own, list | tuple) and bool(own) and all(map(_is_place, own))


def _is_place(place: object) -> bool:
    if isinstance(place, int) and not isinstance(place, bool):
        return 0 < place <= MOST_ELSEWHERE
    return isinstance(place, str) and bool(place)
