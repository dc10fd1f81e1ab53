"""Labelled images, texts and lists of numbers of `datasets` as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from numpy import ndarray
from torch import Tensor

from msfusion.batch import Batch
from msfusion.data.builtin import stratified
from msfusion.data.columns import (
    Columns,
    column_values,
    image_mode,
    is_missing,
    refuse_inexact,
    require_one_kind,
    text_values,
)
from msfusion.data.images import decode_images, normalised
from msfusion.data.loaded import Loaded
from msfusion.data.spec import DataSpec
from msfusion.data.text import Encoder, encode_texts, padded
from msfusion.errors import DataError

MANY = 100
"""From so many examples on, labels that all differ are taken for a mistake."""


def load_classification(
    train: Any,
    test: Any | None,
    columns: Columns,
    keys: Shaped[ndarray, " examples"] | None,
    spec: DataSpec,
    holder: str = "the test split",
) -> Loaded:
    """The examples of a training and a test split (or, without one, a held-out share of each label).

    `keys`, one for each row of the training split, are what a partition goes by; by default the labels. `holder` is
    what the test split is called in messages.
    Labels are texts or integers; those other than 0 ... k - 1 become the classes 0 ... k - 1 in sorted order, whose
    names are the labels.
    Raises DataError for labels that are missing or unknown to the training split, and inputs that cannot be read.
    """
    assert columns.label is not None
    values = _label_values(train, columns.label, "the training split")
    classes = _classes(values, _declared(train, columns.label), columns.label)
    train_labels = _numbered(values, classes, "the training split")
    if test is None:
        kept, held_out = stratified(train_labels, spec.test_share or 0.2, spec.seed)
        test, test_labels = train, train_labels
    else:
        kept, held_out = torch.arange(len(train)), torch.arange(len(test))
        test_values = _label_values(test, columns.label, holder)
        named = _by_name(test_values, _declared(test, columns.label), classes)
        test_labels = _numbered(named, classes, holder)
    train_rows, test_rows = (
        chosen_rows(kept, spec.max_train, spec),
        chosen_rows(held_out, spec.max_test, spec),
    )
    train_inputs, test_inputs, encoder = inputs_of(
        Chosen(train, train_rows, "the training split"), Chosen(test, test_rows, holder), columns, spec
    )
    description = f"{spec.source}: {columns.kind} classification, {_told(classes)}"
    return Loaded(
        Batch((train_inputs,), train_labels[train_rows]),
        Batch((test_inputs,), test_labels[test_rows]),
        "classification",
        len(classes.names),
        Path(spec.source).name,
        description,
        keys=train_labels[train_rows].numpy() if keys is None else keys[train_rows.numpy()],
        label_names=classes.names,
        vocabulary_size=encoder.size if encoder else None,
        padding=encoder.padding if encoder else None,
        tokens=encoder.tokens if encoder else (),
        tokenizer=encoder.name if encoder else None,
    )


@dataclass(frozen=True)
class Chosen:
    """Rows of a split, and what that is called in messages."""

    split: Any
    rows: Tensor
    holder: str


def inputs_of(
    train: Chosen, test: Chosen, columns: Columns, spec: DataSpec
) -> tuple[Tensor, Tensor, Encoder | None]:
    """The input column of both splits as tensors; for text also how it was encoded."""
    if columns.kind == "image":
        return *_images(train, test, columns.input, spec), None
    if columns.kind == "numbers":
        return _numbers(train, columns.input), _numbers(test, columns.input), None
    if test.split is train.split:  # a share of it is held out
        test = replace(test, holder=train.holder)
    train_texts, test_texts = _texts(train, columns.input), _texts(test, columns.input)
    tokenizer = spec.tokenizer or "words"
    train_ids, test_ids, encoder = encode_texts(
        tokenizer, train_texts, test_texts, spec.vocabulary_size, spec.length
    )
    return padded(train_ids, spec.length, encoder), padded(test_ids, spec.length, encoder), encoder


@dataclass(frozen=True)
class Classes:
    """The classes of a data set: their names, and which class each value of the label column stands for."""

    names: tuple[str, ...]
    numbers: Mapping[int | str, int]
    mapped: bool
    """Whether the values are whole numbers other than 0 ... k - 1."""


def _label_values(split: Any, column: str, holder: str) -> list[int | str]:
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
            raise DataError(
                f"example {row} of {holder} has a label {shown} in the column '{column}': labels must be integers or "
                "text."
            )
    require_one_kind(values, f"the labels of {holder}")
    return values


def _classes(values: Sequence[int | str], declared: Sequence[str] | None, column: str) -> Classes:
    """The classes of the training labels: those that the column declares, or its different values in sorted order."""
    if declared is not None:
        names = tuple(declared)
        numbers: dict[int | str, int] = {name: index for index, name in enumerate(names)}
        return Classes(names, numbers | {index: index for index in range(len(names))}, mapped=False)
    found: list[Any] = sorted(set(values))
    if len(found) == len(values) > MANY:
        raise DataError(
            f"all {len(values)} examples have different labels in the column '{column}', as only names and measures "
            "have: name the column of the classes with data.label_column."
        )
    mapped = not isinstance(found[0], str) and found != list(range(len(found)))
    return Classes(tuple(map(str, found)), {value: index for index, value in enumerate(found)}, mapped)


def _numbered(values: Sequence[int | str], classes: Classes, holder: str) -> Tensor:
    """The class of each label, int64. Raises DataError, naming the first one, for labels that are no class."""
    for row, value in enumerate(values):
        if value not in classes.numbers:
            raise DataError(
                f"example {row} of {holder} has label {value!r}, which is none of the {len(classes.names)} classes of "
                "the training split."
            )
    return torch.tensor([classes.numbers[value] for value in values], dtype=torch.int64)


def _declared(split: Any, column: str) -> tuple[str, ...] | None:
    """The names of the classes that a column declares (`datasets.ClassLabel`), if it does."""
    names = getattr(split.features.get(column), "names", None)
    return tuple(names) if names else None


def _by_name(
    values: list[int | str], declared: Sequence[str] | None, classes: Classes
) -> Sequence[int | str]:
    """The labels by the names that their own column declares: another split may number the classes otherwise.

    Where the classes have no names but numbers, those it is.
    """
    if declared is None or not any(isinstance(label, str) for label in classes.numbers):
        return values
    return [
        declared[value] if isinstance(value, int) and 0 <= value < len(declared) else value
        for value in values
    ]


def _told(classes: Classes) -> str:
    """The number of classes, and which labels they are where that is not their number."""
    count = len(classes.names)
    if not classes.mapped:
        return f"{count} classes"
    shown = ", ".join(classes.names[:5]) + (f" ... {classes.names[-1]}" if count > 5 else "")
    return f"{count} classes (labels {shown} as classes 0 to {count - 1})"


def chosen_rows(rows: Tensor, limit: int | None, spec: DataSpec) -> Tensor:
    """At most `limit` of the rows, in random order (in their own for a contiguous partition)."""
    if spec.partition != "contiguous":
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(spec.seed))]
    return rows[:limit]


def _in_file_order(chosen: Chosen) -> tuple[Any, Tensor, list[int]]:
    """The split of these rows alone in the file's order (fast), how to bring them back, sorted rows."""
    ordered, position = chosen.rows.sort()
    wanted = ordered.tolist()
    whole = len(wanted) == len(chosen.split)
    return chosen.split if whole else chosen.split.select(wanted), position.argsort(), wanted


def _images(train: Chosen, test: Chosen, column: str, spec: DataSpec) -> tuple[Tensor, Tensor]:
    def decoded(chosen: Chosen, channels: int | None) -> Tensor:
        rows, back, numbers = _in_file_order(chosen)
        cells, mode = column_values(rows, column), image_mode(chosen.split, column)
        return decode_images(cells, numbers, spec, chosen.holder, channels, mode)[back]

    train_images = decoded(train, spec.channels)
    test_images = decoded(test, train_images.shape[1])
    if train_images.dtype != test_images.dtype:
        raise DataError(
            f"the images of the training split have {_bits(train_images)} bits a pixel and those of {test.holder} "
            f"{_bits(test_images)}: bring all to one depth."
        )
    if train_images.shape[2:] != test_images.shape[2:]:
        raise DataError(
            f"the images of the training split are {_size(train_images)} pixels and those of {test.holder} "
            f"{_size(test_images)}: set data.image_size to bring all to one size."
        )
    return normalised(train_images, test_images, spec)


def _bits(images: Tensor) -> int:
    """Of a pixel, before it was decoded."""
    return 8 if images.dtype == torch.uint8 else 16


def _size(images: Tensor) -> str:
    return f"{images.shape[3]}x{images.shape[2]}"


def _texts(chosen: Chosen, column: str) -> Sequence[str]:
    rows, back, numbers = _in_file_order(chosen)
    values = text_values(rows, column, chosen.holder, numbers)
    return [values[index] for index in back.tolist()]


def _numbers(chosen: Chosen, column: str) -> Tensor:
    rows, back, _ = _in_file_order(chosen)
    values = column_values(rows, column)
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold is found when the inputs are checked
            return torch.from_numpy(np.array(values, dtype=np.float32))[back]
    except (ValueError, TypeError) as error:
        raise DataError(
            f"the column '{column}' holds no lists of numbers of one length ({error})."
        ) from error
