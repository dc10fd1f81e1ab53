"""Which columns of a data set are inputs and labels, and their values."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from msfusion.data.spec import DataSpec
from msfusion.errors import DataError

LABEL_NAMES = ("label", "labels", "fine_label", "coarse_label", "target", "class", "intent")
_ORDERED = (str, bytes, int, float, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta)
"""Values that a partition can go by (bool is an int, datetime a date): they have an order."""
TEXT_NAMES = ("text", "sentence", "content", "review", "question", "document")


@dataclass(frozen=True)
class Columns:
    """Which columns are used: the input and its kind (`image`, `text` or `numbers`), and the label if any."""

    input: str
    kind: str
    label: str | None


def column_values(split: Any, column: str) -> list[Any]:
    """All values of a column, images undecoded. Raises DataError, listing the columns, if it is missing."""
    if column not in split.column_names:
        raise DataError(
            f"there is no column '{column}' in the data; there are {', '.join(split.column_names)}."
        )
    if type(split.features[column]).__name__ == "Image":
        from datasets import Image

        split = split.cast_column(column, Image(decode=False))
    values: list[Any] = split.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    if type(split.features[column]).__name__ == "Json":  # values of several kinds, each kept as JSON text
        values = [None if value is None else json.loads(value) for value in values]
    return values


def text_values(split: Any, column: str, holder: str, rows: Sequence[int] | None = None) -> list[str]:
    """All texts of a column. Raises DataError, naming the first such example, where there is none (null).

    `rows` are the numbers of the examples where the split is a part of the data.
    """
    values = column_values(split, column)
    for row, value in enumerate(values):
        if value is None:
            raise DataError(
                f"example {row if rows is None else rows[row]} of {holder} has no text in the column '{column}': give "
                "it one, or leave such rows out."
            )
    return values


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, or NaN, which pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def refuse_inexact(value: Any, whose: str, column: str) -> None:
    """Raise DataError for a float so large that other whole numbers were rounded to it."""
    if isinstance(value, float) and math.isfinite(value) and abs(value) >= 2**53:
        raise DataError(
            f"{whose} {value!r} in the {column}, a floating point number too large to tell from its neighbours: write "
            "all values as whole numbers, or as text."
        )


def require_one_kind(values: Sequence[Any], what: str) -> None:
    """Raise DataError, naming the first such row, where values differ in type. Whole and other numbers are one."""
    kinds = [int if kind is float else kind for kind in map(type, values)]
    if len(set(kinds)) > 1:
        odd = next(row for row, kind in enumerate(kinds) if kind is not kinds[0])
        raise DataError(
            f"{what} are of several kinds: {type(values[0]).__name__} in example 0 and {type(values[odd]).__name__} in "
            f"example {odd}; write all in one."
        )


def partition_keys(split: Any, column: str, holder: str) -> Int[ndarray, " examples"]:
    """For each row the number of its value among the column's values in sorted order.

    Raises DataError, naming the first such row, for rows without a value, or with one that has no order (lists, dicts).
    """
    values = column_values(split, column)
    for row, value in enumerate(values):
        if is_missing(value):
            raise DataError(
                f"example {row} of {holder} has no value in the partition column '{column}': give it one, or leave "
                "such rows out."
            )
        if not isinstance(value, _ORDERED):
            raise DataError(
                f"example {row} of {holder} has a {type(value).__name__} in the partition column '{column}': a "
                "partition goes by texts, numbers or dates."
            )
        refuse_inexact(value, f"example {row} of {holder} has the value", f"partition column '{column}'")
    require_one_kind(values, f"the values of the partition column '{column}'")
    number = {value: index for index, value in enumerate(sorted(set(values)))}
    return np.array([number[value] for value in values], dtype=np.int64)


def image_mode(split: Any, column: str) -> str | None:
    """The Pillow mode to which a column of images says that they are converted; None where it says nothing."""
    mode: str | None = getattr(split.features[column], "mode", None)
    return mode


def find_columns(split: Any, spec: DataSpec) -> Columns:
    """Which columns hold inputs and labels: as `spec` says, or by type and usual names; or DataError."""
    features = split.features
    for name in (spec.input_column, spec.label_column, spec.partition_column):
        if name is not None and name not in features:
            raise DataError(f"there is no column '{name}' in {spec.source}; there are {', '.join(features)}.")
    label = spec.label_column or label_column(features)
    if spec.task == "language_modelling":
        label = None
    if spec.task in ("classification", "regression") and label is None:
        raise DataError(
            f"no label column found in {spec.source}: its columns are {', '.join(features)}, and none is called "
            f"{', '.join(LABEL_NAMES)}; set data.label_column to the one that holds labels."
        )
    kinds = {
        name: _kind(feature)
        for name, feature in features.items()
        if name not in (label, spec.partition_column)
    }
    chosen = spec.input_column or _guess_input(kinds)
    kind = _kind(features[chosen]) if chosen is not None else None
    if chosen is not None and kind is None:
        held = getattr(features[chosen], "dtype", type(features[chosen]).__name__)
        raise DataError(
            f"the column '{chosen}' of {spec.source} holds {held}: the input must be no column but one of images, text "
            "or lists of numbers."
        )
    if chosen is None or kind is None:
        raise DataError(
            f"no column of images, text or lists of numbers found in {spec.source}: its columns are "
            f"{', '.join(features)}; set data.input_column to the one that holds inputs."
        )
    if (
        label is None
        and spec.task is None
        and len(features) > 1
        and chosen not in (*TEXT_NAMES, spec.input_column)
    ):
        raise DataError(
            f"it is not clear what {spec.source} is for: its columns are {', '.join(features)}, and none is called as "
            f"labels are ({', '.join(LABEL_NAMES)}) or texts ({', '.join(TEXT_NAMES)}); set data.label_column to "
            "classify, or data.task = 'language_modelling'."
        )
    return Columns(chosen, kind, label)


def _kind(feature: Any) -> str | None:
    """What a column holds: image, text, numbers (lists of them), or None: nothing that a model could read."""
    kind = type(feature).__name__
    if kind == "Image":
        return "image"
    if kind == "Value" and feature.dtype in ("string", "large_string"):
        return "text"
    return "numbers" if kind in ("List", "Sequence", "LargeList", "Array2D", "Array3D") else None


def label_column(names: Collection[str]) -> str | None:
    """The column that holds labels, by the usual names, or by its type where `names` are the features of a split."""
    kinds = names.items() if isinstance(names, Mapping) else ()
    classes = [name for name, feature in kinds if type(feature).__name__ == "ClassLabel"]
    return next((name for name in (*LABEL_NAMES, *classes) if name in names), None)


def _guess_input(kinds: dict[str, str | None]) -> str | None:
    """The first image column, or else text under a usual name, or else any text, or else lists of numbers."""
    for wanted in ("image", "text", "numbers"):
        names = [name for name, kind in kinds.items() if kind == wanted]
        if names:
            return next((name for name in TEXT_NAMES if name in names), names[0])
    return None
