"""Examples as users have them (tensors, a `torch.utils.data.Dataset`) as a `Batch`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from msfusion.batch import Batch
from msfusion.errors import DataError
from msfusion.imports import in_one_line

TARGETS = ("targets", "target", "labels", "label")
"""What the targets are called in an example that is a dict."""


def batch_of(data: Any, whose: str = "the data") -> Batch:
    """All examples of some data, stacked; `whose` says in messages whose they are.

    A `Batch` is taken as it is; a tuple is (input, ..., targets), each a tensor with the examples on axis 0; of a
    `torch.utils.data.Dataset` every example is such a tuple, or a dict whose targets are called `targets` or `labels`.
    Raises DataError for anything else, for a dataset without a length, and for examples of different shapes.
    """
    if isinstance(data, Batch):
        named = data.inputs if isinstance(data.inputs, dict) else dict(enumerate(data.inputs))
        _check(
            {**{f"input {name}": tensor for name, tensor in named.items()}, "targets": data.targets}, whose
        )
        return replace(data, targets=_labels(data.targets))
    if isinstance(data, tuple | list) and data and all(isinstance(each, Tensor) for each in data):
        return _from_sequence(data, whose)
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, str | Mapping):
        raise DataError(
            f"{whose}: a {type(data).__name__} holds no examples that can be counted: give a Batch, a tuple of tensors "
            "(inputs, targets), or a torch.utils.data.Dataset with a length"
        )
    if len(data) == 0:
        raise DataError(f"{whose}: there are no examples")
    from torch.utils.data import default_collate

    try:
        stacked = default_collate([data[index] for index in range(len(data))])
    except Exception as error:  # whatever a user's dataset raises, and shapes that differ
        raise DataError(f"{whose}: examples cannot be stacked ({in_one_line(error)})") from error
    if isinstance(stacked, Mapping):
        return _from_mapping(stacked, whose)
    if isinstance(stacked, tuple | list):
        return _from_sequence(stacked, whose)
    raise DataError(
        f"{whose}: an example is a {type(data[0]).__name__}: it must be a tuple (input, target) or a dict"
    )


def _from_sequence(parts: Sequence[Any], whose: str) -> Batch:
    if len(parts) < 2:
        raise DataError(f"{whose}: there is one tensor, which cannot be both inputs and targets: give both")
    *inputs, targets = parts
    named = {f"input {number}": tensor for number, tensor in enumerate(inputs)}
    _check({**named, "targets": targets}, whose)
    return Batch(tuple(inputs), _labels(targets))


def _from_mapping(parts: Mapping[str, Any], whose: str) -> Batch:
    names = [name for name in TARGETS if name in parts]
    if len(names) != 1 or len(parts) < 2:
        raise DataError(
            f"{whose}: an example has {', '.join(parts)}: one of them must be called {' or '.join(TARGETS)}, and the "
            "others be inputs"
        )
    _check(parts, whose)
    return Batch(
        {name: tensor for name, tensor in parts.items() if name != names[0]}, _labels(parts[names[0]])
    )


def _labels(targets: Tensor) -> Tensor:
    """Whole numbers as int64, the type of labels; others as they are."""
    return targets if targets.is_floating_point() or targets.is_complex() else targets.long()


def _check(tensors: Mapping[str, Any], whose: str) -> None:
    lengths = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.ndim == 0:
            raise DataError(
                f"{whose}: {name} is a {type(tensor).__name__}, not a tensor with an axis of examples"
            )
        lengths[name] = len(tensor)
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise DataError(f"{whose}: inputs and targets differ in how many examples they have ({told})")
