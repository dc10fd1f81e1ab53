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
    """Which columns are used: the inputs and their kind, and the label if any.

    A column of images, texts or lists of numbers (kind `image`, `text`, `numbers`) is the only input; a `table` has any
    number of columns, each with a number or a word in a row.
    """

    inputs: tuple[str, ...]
    kind: str
    label: str | None

    @property
    def input(self) -> str:
        """The only one, or the first."""
        return self.inputs[0]


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
    """All texts of a column. Raises DataError, naming the first such example, where there is none (null), or no text.

    `rows` are the numbers of the examples where the split is a part of the data.
    """
    values = column_values(split, column)
    for row, value in enumerate(values):
        if value is None:
            raise DataError(
                f"example {row if rows is None else rows[row]} of {holder} has no text in the column '{column}': give "
                "it one, or leave such rows out."
            )
        if not isinstance(value, str):
            raise DataError(
                f"example {row if rows is None else rows[row]} of {holder} has a value of the type "
                f"{type(value).__name__} in the column '{column}': it must be a text."
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
    asked = spec.input_column if isinstance(spec.input_column, tuple) else (spec.input_column,)
    for name in (*asked, spec.label_column, spec.partition_column):
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
        name: kind_of(feature)
        for name, feature in features.items()
        if name not in (label, spec.partition_column)
    }
    if isinstance(spec.input_column, tuple):
        return Columns(_table(spec.input_column, features, label, spec), "table", label)
    if spec.input_column is not None:
        kind = kind_of(features[spec.input_column])
        if kind is None:
            raise DataError(_unreadable(spec.input_column, features, spec))
        return Columns((spec.input_column,), "table" if kind == "number" else kind, label)
    chosen = _guess_inputs(kinds, spec)
    if chosen is None:
        raise DataError(
            f"no column of images, text or numbers found in {spec.source}: its columns are "
            f"{', '.join(features)}; set data.input_column to the one that holds inputs, or to a list of them."
        )
    if label is None and spec.task is None and len(features) > 1 and chosen[0] not in TEXT_NAMES:
        raise DataError(
            f"it is not clear what {spec.source} is for: its columns are {', '.join(features)}, and none is called as "
            f"labels are ({', '.join(LABEL_NAMES)}) or texts ({', '.join(TEXT_NAMES)}); set data.label_column to "
            "classify, or data.task = 'language_modelling'."
        )
    kind = kinds[chosen[0]] or ""
    return Columns(chosen, "table" if kind == "number" else kind, label)


def _table(
    names: tuple[str, ...], features: Mapping[str, Any], label: str | None, spec: DataSpec
) -> tuple[str, ...]:
    """The columns of a table that were asked for. Raises DataError for one that holds neither numbers nor words."""
    for name in names:
        if name == label or names.count(name) > 1:
            raise DataError(f"data.input_column has '{name}', which is the label or stands there twice.")
        if kind_of(features[name]) not in ("number", "text"):
            raise DataError(_unreadable(name, features, spec))
    return names


def _unreadable(name: str, features: Mapping[str, Any], spec: DataSpec) -> str:
    held = getattr(features[name], "dtype", type(features[name]).__name__)
    return (
        f"the column '{name}' of {spec.source} holds {held}: the input must be a column of images, text or lists of "
        "numbers, or a list of columns of numbers and words."
    )


def kind_of(feature: Any) -> str | None:
    """What a column holds: image, text, numbers (lists of them), number, or None: nothing that a model could read."""
    kind = type(feature).__name__
    if kind == "Image":
        return "image"
    if kind in ("List", "Sequence", "LargeList", "Array2D", "Array3D"):
        return "numbers"
    if kind != "Value":
        return None
    if feature.dtype in ("string", "large_string"):
        return "text"
    return "number" if feature.dtype.startswith(("int", "uint", "float", "bool")) else None


def label_column(names: Collection[str]) -> str | None:
    """The column that holds labels, by the usual names, or by its type where `names` are the features of a split."""
    kinds = names.items() if isinstance(names, Mapping) else ()
    classes = [name for name, feature in kinds if type(feature).__name__ == "ClassLabel"]
    return next((name for name in (*LABEL_NAMES, *classes) if name in names), None)


def _guess_inputs(kinds: Mapping[str, str | None], spec: DataSpec) -> tuple[str, ...] | None:
    """The first image column, or else text under a usual name, or else any text, or lists of numbers, or a table.

    Raises DataError where a text of no usual name stands among several numbers: it could be one column of a table.
    """
    by_kind = {
        wanted: [name for name, kind in kinds.items() if kind == wanted] for wanted in set(kinds.values())
    }
    texts, numbers = by_kind.get("text", []), by_kind.get("number", [])
    if by_kind.get("image"):
        return (by_kind["image"][0],)
    usual = next((name for name in TEXT_NAMES if name in texts), None)
    if usual is None and texts and len(numbers) > 1 and spec.task != "language_modelling":
        raise DataError(
            f"it is not clear which columns of {spec.source} are inputs: {', '.join(map(str, [*texts, *numbers]))}; "
            f"set data.input_column to the one with texts, or to a list for a table, such as {[*numbers, *texts]}."
        )
    if texts:
        return (usual or texts[0],)
    if by_kind.get("numbers"):
        return (by_kind["numbers"][0],)
    return tuple(numbers) or None
