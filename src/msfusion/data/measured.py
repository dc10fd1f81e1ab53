"""Examples whose targets are numbers rather than classes, from columns of `datasets`."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Float64, Shaped
from numpy import ndarray
from torch import Tensor

from msfusion.batch import Batch
from msfusion.data.classified import chosen_rows
from msfusion.data.columns import Columns, column_values
from msfusion.data.inputs import Chosen, encoded
from msfusion.data.loaded import Loaded
from msfusion.data.preprocessing import Preprocessing, scale_in
from msfusion.data.spec import TEST_SEED, DataSpec
from msfusion.errors import DataError
from msfusion.quoting import short
from msfusion.target_scale import TargetScale

LARGEST = torch.finfo(torch.float32).max
BLURRED = 0.01
"""Where rounding to float32 moves numbers by more than this share of their spread, a model would learn the rounding."""


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
    Raises DataError, naming the example, for one without a number, and for inputs that cannot be read; and where
    float32 cannot tell the numbers apart.
    """
    assert columns.label is not None
    exact = _numbers_of(train, columns.label, "the training split")
    train_targets = exact.float()
    _refuse_blurred(exact, columns.label)
    if test is None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(TEST_SEED))
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
    scale = _scale_for(learnt, spec) if spec.normalise_targets else None
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


def _scale_for(learnt: Float32[Tensor, "examples numbers"], spec: DataSpec) -> TargetScale:
    """That of a model which has been trained and is to go on, where it says as many numbers; else fitted to these."""
    trained = None if spec.scale_of is None else scale_in(Path(spec.scale_of))
    if trained is not None and len(trained.centre) == learnt.shape[1]:
        return trained
    return TargetScale.fitted(learnt)


def targets_of(split: Any, column: str, holder: str) -> Float32[Tensor, "examples numbers"]:
    """The numbers that stand in a column. Raises DataError, naming the example, where there is none."""
    return _numbers_of(split, column, holder).float()


def _numbers_of(split: Any, column: str, holder: str) -> Float64[Tensor, "examples numbers"]:
    """As they stand there; `targets_of` rounds them."""
    values = column_values(split, column)
    rows = [value if isinstance(value, list | tuple | np.ndarray) else [value] for value in values]
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise DataError(
                f"example {number} of {holder} has {len(row)} numbers in the column '{column}', and the "
                f"first {len(rows[0])}: they must be equally many."
            )
        if not len(row):
            raise DataError(
                f"example {number} of {holder} has no number in the column '{column}': there is nothing to predict."
            )
    cells = [(number, each) for number, row in enumerate(rows) for each in row]
    odd = next((cell for cell in cells if not _is_number(cell[1])), None)
    if odd is not None:
        # where one cell is no number, a reader may have left all of them texts: that one is to blame
        odd = next((cell for cell in cells if not _is_number(_read(cell[1]))), odd)
        raise DataError(
            f"example {odd[0]} of {holder} has {_told(odd[1])} in the column '{column}': {_why(odd[1])}."
        )
    return torch.tensor([[float(each) for each in row] for row in rows], dtype=torch.float64)


def _is_number(cell: Any) -> bool:
    """Whether float32 holds it."""
    if not isinstance(cell, bool | int | float | Decimal | np.number):
        return False
    return bool(-LARGEST <= (float(cell) if isinstance(cell, Decimal) else cell) <= LARGEST)  # not for NaN


def _read(cell: Any) -> Any:
    """The number that a text says; what is none, as it is."""
    try:
        return float(cell) if isinstance(cell, str) else cell
    except ValueError:
        return cell


def _told(cell: Any) -> str:
    return short(repr(cell))


def _why(cell: Any) -> str:
    number = _read(cell)
    if isinstance(cell, str) and _is_number(number):
        return "it must be a number, and is a text"
    if isinstance(number, int | float | Decimal) and (isinstance(number, int) or math.isfinite(number)):
        return (
            f"models compute in float32, which holds numbers up to {LARGEST:.2g}; write it in a larger unit"
        )
    return "it must be a finite number"


def _refuse_blurred(exact: Float64[Tensor, "examples numbers"], column: str) -> None:
    """Raise DataError where numbers lie so close together, so far from 0, that float32 takes many for one."""
    rounded = (exact.float().double() - exact).square().mean(0).sqrt()
    for error, numbers in zip(rounded.tolist(), exact.unbind(1), strict=True):
        spread = float(numbers.std(correction=0))
        if error > BLURRED * spread and float(numbers.min()) < float(numbers.max()):
            raise DataError(
                f"the numbers in the column '{column}' lie about {spread:.3g} around {float(numbers.mean()):.10g}, "
                "and float32, in which models compute, cannot tell them apart: write them in another unit, or less a "
                "number that they have in common."
            )
