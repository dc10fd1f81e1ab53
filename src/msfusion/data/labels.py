"""The classes of a data set, and the labels of its rows as their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from msfusion.data.columns import column_values, is_missing, refuse_inexact, require_one_kind
from msfusion.errors import DataError

MANY = 100
"""From so many examples on, labels that all differ are taken for a mistake."""


@dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    column: where the labels stand. names: of the classes 0 ... k - 1. values: what stands in the column for each of
    them. declared: the column says itself what its classes are called, so their numbers stand for them too.
    """

    column: str
    names: tuple[str, ...]
    values: tuple[bool | int | str, ...]
    declared: bool = False

    @classmethod
    def of(cls, split: Any, column: str, values: Sequence[int | str]) -> Classes:
        """Those that the column declares, or the different values of the training labels in sorted order.

        Raises DataError where all of many labels differ.
        """
        declared = _declared(split, column)
        if declared is not None:
            return cls(column, declared, declared, declared=True)
        found: list[Any] = sorted(set(values))
        if len(found) == len(values) > MANY:
            raise DataError(
                f"all {len(values)} examples have different labels in the column '{column}', as only names and "
                "measures have: name the column of the classes with data.label_column."
            )
        return cls(column, tuple(map(str, found)), tuple(found))

    @property
    def mapped(self) -> bool:
        """Whether the values are whole numbers other than 0 ... k - 1."""
        return not isinstance(self.values[0], str) and self.values != tuple(range(len(self.values)))

    @cached_property
    def _numbers(self) -> dict[int | str, int]:
        """Which class each value stands for."""
        numbers: dict[int | str, int] = {value: index for index, value in enumerate(self.values)}
        return numbers | ({index: index for index in range(len(self.names))} if self.declared else {})

    def numbered(self, values: Sequence[int | str], holder: str) -> Int[Tensor, " examples"]:
        """The class of each label. Raises DataError, naming the first one, for labels that are no class."""
        for row, value in enumerate(values):
            if value not in self._numbers:
                raise DataError(
                    f"example {row} of {holder} has label {value!r}, which is none of the {len(self.names)} classes of "
                    "the training split."
                )
        return torch.tensor([self._numbers[value] for value in values], dtype=torch.int64)

    def labels_of(self, split: Any, holder: str) -> Int[Tensor, " examples"]:
        """The class of each row of another split, which may number its classes otherwise: they go by their names.

        Raises DataError for labels that are missing, or no class.
        """
        values, declared = label_values(split, self.column, holder), _declared(split, self.column)
        if declared is not None and any(isinstance(value, str) for value in self.values):
            values = [
                declared[value] if isinstance(value, int) and 0 <= value < len(declared) else value
                for value in values
            ]
        return self.numbered(values, holder)

    def told(self) -> str:
        """The number of classes, and which labels they are where that is not their number."""
        count = len(self.names)
        if not self.mapped:
            return f"{count} classes"
        shown = ", ".join(self.names[:5]) + (f" ... {self.names[-1]}" if count > 5 else "")
        return f"{count} classes (labels {shown} as classes 0 to {count - 1})"


def label_values(split: Any, column: str, holder: str) -> list[int | str]:
    """The labels as integers or text. Raises DataError, naming the first example, for one that is neither."""
    values = column_values(split, column)
    for row, value in enumerate(values):
        if is_missing(value):
            raise DataError(f"example {row} of {holder} has no label.")
        refuse_inexact(value, f"example {row} of {holder} has the label", f"column '{column}'")
        if (
            isinstance(value, float) and value.is_integer()
        ):  # as pandas writes whole numbers beside missing ones
            values[row] = int(value)
        elif not isinstance(value, int | str):
            shown = value if isinstance(value, float) else f"of type {type(value).__name__}"
            remedy = "; to predict numbers, set data.task = 'regression'" if isinstance(value, float) else ""
            raise DataError(
                f"example {row} of {holder} has a label {shown} in the column '{column}': labels must be integers or "
                f"text{remedy}."
            )
    require_one_kind(values, f"the labels of {holder}")
    return values


def _declared(split: Any, column: str) -> tuple[str, ...] | None:
    """The names of the classes that a column declares (`datasets.ClassLabel`), if it does."""
    names = getattr(split.features.get(column), "names", None)
    return tuple(names) if names else None
