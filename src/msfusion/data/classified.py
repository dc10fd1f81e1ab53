"""Labelled images, texts, tables and lists of numbers of `datasets` as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from numpy import ndarray
from torch import Tensor

from msfusion.batch import Batch
from msfusion.data.builtin import stratified
from msfusion.data.columns import Columns
from msfusion.data.inputs import Chosen, encoded
from msfusion.data.labels import Classes, label_values
from msfusion.data.loaded import Loaded
from msfusion.data.preprocessing import Preprocessing
from msfusion.data.spec import TEST_SEED, DataSpec


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
    values = label_values(train, columns.label, "the training split")
    classes = Classes.of(train, columns.label, values)
    train_labels = classes.numbered(values, "the training split")
    if test is None:
        kept, held_out = stratified(train_labels, spec.test_share or 0.2, TEST_SEED)
        test, test_labels = train, train_labels
    else:
        kept, held_out = torch.arange(len(train)), torch.arange(len(test))
        test_labels = classes.labels_of(test, holder)
    train_rows, test_rows = (
        chosen_rows(kept, spec.max_train, spec),
        chosen_rows(held_out, spec.max_test, spec),
    )
    train_inputs, test_inputs, encoding = encoded(
        Chosen(train, train_rows, "the training split"), Chosen(test, test_rows, holder), columns, spec
    )
    return Loaded(
        Batch((train_inputs,), train_labels[train_rows]),
        Batch((test_inputs,), test_labels[test_rows]),
        "classification",
        len(classes.names),
        Path(spec.source).name,
        f"{spec.source}: {columns.kind} classification, {classes.told()}",
        keys=train_labels[train_rows].numpy() if keys is None else keys[train_rows.numpy()],
        label_names=classes.names,
        preprocessing=Preprocessing("classification", encoding, len(classes.names), classes),
        **encoding.known,
    )


def chosen_rows(rows: Tensor, limit: int | None, spec: DataSpec) -> Tensor:
    """At most `limit` of the rows, in random order (in their own for a contiguous partition)."""
    if spec.partition != "contiguous":
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(spec.seed))]
    return rows[:limit]
