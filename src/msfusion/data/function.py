"""Data from a user's own function: `module:function`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from msfusion.batch import Batch
from msfusion.data.federated import FederatedData
from msfusion.data.loaded import Loaded
from msfusion.data.spec import DataSpec
from msfusion.errors import DataError
from msfusion.imports import failing_as, import_function

EXPECTED = (
    "it must return FederatedData, or (Batch, Batch): train and test, or ([Batch of each participant], Batch)"
)


def load_function(spec: DataSpec) -> FederatedData | Loaded:
    """What the function returns when it is called with `spec.options`.

    FederatedData is taken as it is, and (participants, test) nearly so: the task, the number of classes and,
    for integer inputs, the vocabulary are read off the tensors. (train, test) is to be shared out by label.
    Raises ConfigError when there is no such function; DataError when it fails or returns anything else.
    """
    given = _called(spec.source, "data.source", spec.options)
    if isinstance(given, FederatedData):
        return given
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Batch)):
        raise DataError(f"data.source = '{spec.source}' returned {_described(given)}: {EXPECTED}.")
    first, test = given
    if isinstance(first, Batch):
        return _loaded(first, test, spec)
    if isinstance(first, Sequence) and first and all(isinstance(batch, Batch) for batch in first):
        known = _known([*first, test], spec)
        return FederatedData(tuple(first), test, name=spec.source, description=spec.source, **known)
    raise DataError(f"data.source = '{spec.source}' returned ({_described(first)}, Batch): {EXPECTED}.")


def call_function(reference: str, key: str, options: Mapping[str, Any]) -> Batch:
    """The examples that a function returns. Raises as `load_function`; `key` is the setting that names it."""
    given = _called(reference, key, options)
    if not isinstance(given, Batch):
        raise DataError(f"{key} = '{reference}' returned {_described(given)}: it must return a Batch.")
    return given


def _called(reference: str, key: str, options: Mapping[str, Any]) -> Any:
    """What the function returns. Raises ConfigError where there is none, DataError where it fails."""
    function = import_function(reference, key)
    with failing_as(DataError, f"{key} = '{reference}'"):
        return function(**options)


def _loaded(train: Batch, test: Batch, spec: DataSpec) -> Loaded:
    known = _known([train, test], spec)
    limit = len(train) if spec.max_train is None else spec.max_train
    if known["task"] != "language_modelling" and spec.partition != "contiguous":
        train = train.take(
            torch.randperm(len(train), generator=torch.Generator().manual_seed(spec.seed))[:limit]
        )
    else:
        train = train.take(slice(limit))
    keys = train.targets.numpy() if known["task"] == "classification" else None
    test = test.take(slice(spec.max_test))
    return Loaded(train, test, name=spec.source, description=spec.source, keys=keys, **known)


def _known(batches: Sequence[Batch], spec: DataSpec) -> dict[str, Any]:
    """Task, classes and vocabulary as the tensors show them."""
    targets = batches[0].targets
    numbers = targets.is_floating_point()
    largest = max((int(batch.targets.max()) for batch in batches if batch.targets.numel()), default=0)
    if spec.task in ("regression", "other") or numbers or targets.ndim > 2:
        classes = (targets.shape[1] if targets.ndim == 2 else 1) if numbers else largest + 1
        task = spec.task or ("regression" if numbers and targets.ndim < 3 else "other")
        return {"task": task, "classes": classes, "vocabulary_size": None}
    language = any(batch.targets.ndim > 1 for batch in batches)
    tokens = []
    for batch in batches:
        named = batch.inputs if isinstance(batch.inputs, dict) else dict(enumerate(batch.inputs))
        ids = named.get("input_ids", named.get(0))  # type: ignore[call-overload]  # keys of either kind
        if ids is not None and ids.numel() and not ids.is_floating_point():
            tokens.append(int(ids.max()))
    classes = max([largest, *tokens]) + 1 if language else largest + 1
    return {
        "task": "language_modelling" if language else "classification",
        "classes": classes,
        "vocabulary_size": (classes if language else max(tokens) + 1) if tokens else None,
    }


def _described(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(item).__name__ for item in value)})"
    return type(value).__name__
