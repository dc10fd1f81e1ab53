"""Examples whose targets are numbers rather than classes, from columns of `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Shaped
from numpy import ndarray
from torch import Tensor

from msfusion.batch import Batch
from msfusion.data.classified import chosen_rows
from msfusion.data.columns import Columns, column_values
from msfusion.data.inputs import Chosen, encoded
from msfusion.data.loaded import Loaded
from msfusion.data.preprocessing import Preprocessing
from msfusion.data.spec import DataSpec
from msfusion.errors import DataError
from msfusion.target_scale import TargetScale


def load_measured(
    train: Any,
    test: Any | None,
    columns: Columns,
    keys: Shaped[ndarray, " examples"] | None,
    spec: DataSpec,
    holder: str = "the test split",
) -> Loaded:
    """The examples of a training and a test split (or, without one, a share that is held out at random).

    The label column holds a number, or a list of numbers of one length, for each example; targets are float32 of shape
    [examples, numbers], in the units of the column. The scale on which a model learns them is a part of the
    preprocessing; it is fitted to those of the training examples. `keys`, one for each row of the training split, are
    what a partition goes by; `holder` is what the test split is called in messages.
    Raises DataError, naming the example, for one without a number, and for inputs that cannot be read.
    """
    assert columns.label is not None
    train_targets = targets_of(train, columns.label, "the training split")
    if test is None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(spec.seed))
        count = max(1, round(len(train) * (spec.test_share or 0.2)))
        kept, held_out = order[count:].sort().values, order[:count].sort().values
        test, test_targets = train, train_targets
    else:
        kept, held_out = torch.arange(len(train)), torch.arange(len(test))
        test_targets = targets_of(test, columns.label, holder)
    if train_targets.shape[1] != test_targets.shape[1]:
        raise DataError(
            f"the column '{columns.label}' holds {train_targets.shape[1]} numbers in the training split and "
            f"{test_targets.shape[1]} in {holder}: make them equal."
        )
    train_rows, test_rows = (
        chosen_rows(kept, spec.max_train, spec),
        chosen_rows(held_out, spec.max_test, spec),
    )
    train_inputs, test_inputs, encoding = encoded(
        Chosen(train, train_rows, "the training split"), Chosen(test, test_rows, holder), columns, spec
    )
    count, learnt = train_targets.shape[1], train_targets[train_rows]
    scale = TargetScale.fitted(learnt) if spec.normalise_targets else None
    return Loaded(
        Batch((train_inputs,), learnt),
        Batch((test_inputs,), test_targets[test_rows]),
        "regression",
        count,
        Path(spec.source).name,
        f"{spec.source}: {columns.kind}, {count} number{'s' if count > 1 else ''} to predict",
        keys=None if keys is None else keys[train_rows.numpy()],
        preprocessing=Preprocessing("regression", encoding, count, label=columns.label, targets=scale),
        **encoding.known,
    )


def targets_of(split: Any, column: str, holder: str) -> Float32[Tensor, "examples numbers"]:
    """The numbers that stand in a column. Raises DataError, naming the example, where there is none."""
    values = column_values(split, column)
    rows = [value if isinstance(value, list | tuple | np.ndarray) else [value] for value in values]
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise DataError(
                f"example {number} of {holder} has {len(row)} numbers in the column '{column}', and the "
                f"first {len(rows[0])}: they must be equally many."
            )
        for each in row:
            if isinstance(each, bool | int | float | np.number) and np.isfinite(np.float32(each)):
                continue
            raise DataError(
                f"example {number} of {holder} has {each!r} in the column '{column}': it must be a finite number."
            )
    return torch.tensor([[float(each) for each in row] for row in rows], dtype=torch.float32)
