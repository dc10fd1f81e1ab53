"""Tables: columns of numbers and of words as one list of numbers for each row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from msfusion.data.columns import column_values, is_missing, kind_of, require_one_kind
from msfusion.data.inputs import Chosen
from msfusion.data.spec import DataSpec
from msfusion.errors import DataError
from msfusion.quoting import short

MOST_WORDS = 100
"""Different words in a column. One with more of them is a name or a text, and would make as many inputs."""


@dataclass(frozen=True)
class NumberColumn:
    """A column of numbers, brought to mean 0 and variance 1 of the training set."""

    name: str
    centre: float = 0.0
    spread: float = 1.0

    width: ClassVar[int] = 1

    @classmethod
    def fitted(cls, name: str, values: Sequence[int | float], normalise: bool) -> NumberColumn:
        """To the values of the training examples; a column that is the same everywhere becomes 0."""
        if not normalise:
            return cls(name)
        numbers = np.array(values, dtype=np.float64)
        if numbers.min() == numbers.max():  # the mean of which may be rounded
            return cls(name, float(numbers[0]), 1.0)
        return cls(name, *_mean_and_deviation(numbers))

    def encode(self, values: Sequence[Any], told: Any) -> np.ndarray:
        """[examples, 1]."""
        for row, value in enumerate(values):
            if not isinstance(value, int | float | Decimal):
                raise DataError(
                    f"{told(row)} has {short(repr(value))} in the column '{self.name}': it must be a number."
                )
        with np.errstate(over="ignore"):  # found when the inputs are checked
            return (np.array(values, dtype=np.float64)[:, None] - self.centre) / self.spread


def _mean_and_deviation(numbers: Float64[np.ndarray, " examples"]) -> tuple[float, float]:
    """Of numbers that are not all the same."""
    largest = float(np.abs(numbers).max())
    # outside of this, the squares of what they differ by may be no numbers
    unit = 1.0 if 1e-100 < largest < 1e100 else largest
    numbers = numbers / unit
    return float(numbers.mean()) * unit, float(numbers.std()) * unit or largest


@dataclass(frozen=True)
class WordColumn:
    """A column of words, of which the training set knows these: an input for each, 1 where it stands and else 0."""

    name: str
    words: tuple[str, ...]

    @classmethod
    def fitted(cls, name: str, values: Sequence[str]) -> WordColumn:
        """To the words of the training split. Raises DataError where there are too many."""
        words = tuple(sorted(set(values)))
        if len(words) > MOST_WORDS:
            _refuse_word_among_numbers(name, values)
            raise DataError(
                f"the column '{name}' has {len(words)} different words, more than {MOST_WORDS}: leave it out of "
                "data.input_column."
            )
        return cls(name, words)

    @property
    def width(self) -> int:
        """How many inputs it makes."""
        return len(self.words)

    def encode(self, values: Sequence[Any], told: Any) -> np.ndarray:
        """[examples, words]. Raises DataError for a word that the training split does not have."""
        number = {word: index for index, word in enumerate(self.words)}
        for row, value in enumerate(values):
            if not isinstance(value, str) or value not in number:
                raise DataError(
                    f"{told(row)} has {short(repr(value))} in the column '{self.name}', which the training split does "
                    "not have."
                )
        ones = np.zeros((len(values), len(self.words)))
        ones[np.arange(len(values)), [number[value] for value in values]] = 1
        return ones


@dataclass(frozen=True)
class TableEncoding:
    """The columns of a table side by side, as float32 [examples, inputs]."""

    kind: ClassVar[str] = "table"

    parts: tuple[NumberColumn | WordColumn, ...]

    @classmethod
    def fitted(cls, train: Chosen, names: Sequence[str], spec: DataSpec) -> TableEncoding:
        """To the training examples; the words are those of the whole training split. Raises DataError."""
        return cls(tuple(_fitted(train, name, spec) for name in names))

    @property
    def columns(self) -> tuple[str, ...]:
        """All of them, in order."""
        return tuple(part.name for part in self.parts)

    @property
    def known(self) -> Mapping[str, Any]:
        """Nothing that the inputs do not show."""
        return {}

    @property
    def width(self) -> int:
        """How many inputs a row makes."""
        return sum(part.width for part in self.parts)

    def read(self, chosen: Chosen) -> Float32[Tensor, "examples inputs"]:
        """The inputs of some rows. Raises DataError, naming the row, for a cell that is empty, or of another kind."""
        parts = [part.encode(_values(chosen, part.name), _told(chosen)) for part in self.parts]
        with np.errstate(over="ignore"):  # what float32 cannot hold is found when the inputs are checked
            return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.float32))


def _refuse_word_among_numbers(name: str, values: Sequence[str]) -> None:
    """Raise DataError where most of a column are numbers, naming the first cell that is none."""
    others = [row for row, value in enumerate(values) if not _is_number(value)]
    if others and 2 * len(others) < len(values):
        raise DataError(
            f"row {others[0] + 1} has {short(repr(values[others[0]]))} in the column '{name}', most of which are "
            "numbers: mend it, or leave the column out of data.input_column."
        )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _fitted(train: Chosen, name: str, spec: DataSpec) -> NumberColumn | WordColumn:
    if kind_of(train.split.features[name]) == "text":
        whole = Chosen.all_of(train.split, train.holder)
        return WordColumn.fitted(name, _values(whole, name))
    return NumberColumn.fitted(name, _values(train, name), spec.normalise)


def _values(chosen: Chosen, name: str) -> list[Any]:
    """The cells of a column, of which none may be empty or infinite, and all are of one kind."""
    cells = column_values(chosen.split, name)
    values = [cells[row] for row in chosen.rows.tolist()]
    told = _told(chosen)
    for row, value in enumerate(values):
        if is_missing(value) or value == "":
            raise DataError(
                f"{told(row)} has nothing in the column '{name}': give it a value, or leave such rows or the column "
                "out."
            )
        if isinstance(value, float) and math.isinf(value):
            raise DataError(
                f"{told(row)} has {value}, or a number beyond 1.8e308, in the column '{name}': it must be a finite "
                "number."
            )
    require_one_kind(values, f"the values of the column '{name}'")
    return values


def _told(chosen: Chosen) -> Any:
    """What a row is called in messages."""
    return lambda row: f"example {int(chosen.rows[row])} of {chosen.holder}"
