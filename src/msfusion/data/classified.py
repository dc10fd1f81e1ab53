"""Labelled images, texts and lists of numbers of `datasets` as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from numpy import ndarray
from torch import Tensor

from msfusion.batch import Batch
from msfusion.data.builtin import stratified
from msfusion.data.columns import Columns, column_values
from msfusion.data.images import decode_images, normalised
from msfusion.data.loaded import Loaded, check_labels
from msfusion.data.spec import DataSpec
from msfusion.data.text import Encoder, encode_texts, padded
from msfusion.errors import DataError


def load_classification(
    train: Any,
    test: Any | None,
    columns: Columns,
    keys: Shaped[ndarray, " examples"] | None,
    spec: DataSpec,
) -> Loaded:
    """The examples of a training and a test split (or, without one, a held-out share of each label).

    `keys`, one for each row of the training split, are what a partition goes by; by default the labels.
    Raises DataError for labels that are missing, negative or out of range, and inputs that cannot be read.
    """
    assert columns.label is not None
    train_labels, names = _labels(train, columns.label, None, "the training split")
    if test is None:
        kept, held_out = stratified(train_labels, spec.test_share or 0.2, spec.seed)
        test, test_labels = train, train_labels
    else:
        kept, held_out = torch.arange(len(train)), torch.arange(len(test))
        test_labels, _ = _labels(test, columns.label, names, "the test split")
    train_rows, test_rows = _chosen(kept, spec.max_train, spec), _chosen(held_out, spec.max_test, spec)
    train_inputs, test_inputs, encoder = _inputs(train, test, columns, train_rows, test_rows, spec)
    description = f"{spec.source}: {columns.kind} classification, {len(names)} classes"
    return Loaded(
        Batch((train_inputs,), train_labels[train_rows]),
        Batch((test_inputs,), test_labels[test_rows]),
        "classification",
        len(names),
        Path(spec.source).name,
        description,
        keys=train_labels[train_rows].numpy() if keys is None else keys[train_rows.numpy()],
        label_names=names,
        vocabulary_size=encoder.size if encoder else None,
        padding=encoder.padding if encoder else None,
        tokens=encoder.tokens if encoder else (),
    )


def _inputs(
    train: Any, test: Any, columns: Columns, train_rows: Tensor, test_rows: Tensor, spec: DataSpec
) -> tuple[Tensor, Tensor, Encoder | None]:
    """The input column of both splits as tensors; for text also how it was encoded."""
    if columns.kind == "image":
        return *_images(train, test, columns, train_rows, test_rows, spec), None
    if columns.kind == "numbers":
        train_numbers = _numbers(train, columns.input, train_rows)
        return train_numbers, _numbers(test, columns.input, test_rows), None
    train_texts = _texts(train, columns.input, train_rows)
    test_texts = _texts(test, columns.input, test_rows)
    tokenizer = spec.tokenizer or "words"
    train_ids, test_ids, encoder = encode_texts(tokenizer, train_texts, test_texts, spec.vocabulary_size)
    return padded(train_ids, spec.length, encoder), padded(test_ids, spec.length, encoder), encoder


def _labels(
    split: Any, column: str, names: tuple[str, ...] | None, holder: str
) -> tuple[Tensor, tuple[str, ...]]:
    """The labels as int64, and their names: the feature's, or found here where `names` is None."""
    values = column_values(split, column)
    if None in values:
        raise DataError(f"example {values.index(None)} of {holder} has no label.")
    if isinstance(values[0], str):
        names = names or tuple(sorted(set(values)))
        number = {name: index for index, name in enumerate(names)}
        unknown = next((index for index, value in enumerate(values) if value not in number), None)
        if unknown is not None:
            raise DataError(
                f"example {unknown} of {holder} has label '{values[unknown]}', unknown to the training split."
            )
        return torch.tensor([number[value] for value in values]), names
    if not isinstance(values[0], int):
        raise DataError(
            f"the label column '{column}' holds {type(values[0]).__name__}: labels must be integers or text."
        )
    labels = torch.tensor(values, dtype=torch.int64)
    if names is None:
        named = getattr(split.features[column], "names", None)
        names = tuple(named or map(str, range(int(labels.max()) + 1)))
    check_labels(holder, labels, len(names))
    return labels, names


def _chosen(rows: Tensor, limit: int | None, spec: DataSpec) -> Tensor:
    """At most `limit` of the rows, in random order (in their own for a contiguous partition)."""
    if spec.partition != "contiguous":
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(spec.seed))]
    return rows[:limit]


def _in_file_order(split: Any, column: str, rows: Tensor) -> tuple[list[Any], Tensor, list[int]]:
    """The column's values at these rows in the file's order (fast), how to bring them back, sorted rows."""
    ordered, position = rows.sort()
    wanted = ordered.tolist()
    whole = len(wanted) == len(split)
    return column_values(split if whole else split.select(wanted), column), position.argsort(), wanted


def _images(
    train: Any, test: Any, columns: Columns, train_rows: Tensor, test_rows: Tensor, spec: DataSpec
) -> tuple[Tensor, Tensor]:
    cells, back, numbers = _in_file_order(train, columns.input, train_rows)
    train_images = decode_images(cells, numbers, spec, "the training split", spec.channels)[back]
    cells, back, numbers = _in_file_order(test, columns.input, test_rows)
    test_images = decode_images(cells, numbers, spec, "the test split", train_images.shape[1])[back]
    return normalised(train_images, test_images, spec)


def _texts(split: Any, column: str, rows: Tensor) -> Sequence[str]:
    values, back, _ = _in_file_order(split, column, rows)
    return [values[index] or "" for index in back.tolist()]


def _numbers(split: Any, column: str, rows: Tensor) -> Tensor:
    values, back, _ = _in_file_order(split, column, rows)
    try:
        return torch.from_numpy(np.array(values, dtype=np.float32))[back]
    except (ValueError, TypeError) as error:
        raise DataError(
            f"the column '{column}' holds no lists of numbers of one length ({error})."
        ) from error
