"""What every source gives before it is shared out, and the checks that all data must pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Int, Shaped
from numpy import ndarray
from torch import Tensor

from msfusion.batch import IGNORED, Batch
from msfusion.data.federated import FederatedData
from msfusion.data.preprocessing import Preprocessing
from msfusion.errors import DataError

MOST_CLASSES = 2**24
"""More labels or tokens than any model has: counting up to such a number would only fill the memory."""


@dataclass(frozen=True)
class Loaded:
    """Training and test examples of one source; `keys` are what a partition goes by (labels or a column).

    The other fields are those of `FederatedData`.
    """

    train: Batch
    test: Batch
    task: str
    classes: int
    name: str
    description: str
    keys: Shaped[ndarray, " examples"] | None = None
    label_names: tuple[str, ...] = ()
    vocabulary_size: int | None = None
    padding: int | None = None
    tokens: tuple[str, ...] = ()
    tokenizer: str | None = None
    masked: bool = False
    preprocessing: Preprocessing | None = None

    def check(self) -> None:
        """Raise DataError, as `check_batches` does, before examples are shared out: it counts as the user does."""
        both = {"the training set": self.train, "the test set": self.test}
        check_batches(both, self.classes, self.vocabulary_size, self.task)

    def among(self, participants: tuple[Batch, ...]) -> FederatedData:
        """What is known of this data, with the examples of these participants, and the test set."""
        shared = {each.name for each in fields(Loaded)} & {each.name for each in fields(FederatedData)}
        return FederatedData(participants, **{name: getattr(self, name) for name in shared})


LABELLED = ("classification", "language_modelling")
"""The tasks whose targets are numbers of classes."""


def check_batches(
    batches: Mapping[str, Batch], classes: int, vocabulary_size: int | None, task: str = LABELLED[0]
) -> None:
    """Check examples by the name of who holds them ("the test set", "participant 3").

    Raises DataError, naming the holder and the first odd example, when someone has none, inputs and targets
    differ in number, shapes or names differ between holders, numbers are not finite, labels or tokens are
    out of range, or there are absurdly many classes.
    """
    if classes > MOST_CLASSES:
        raise DataError(
            f"labels up to {classes - 1} would make {classes} classes, more than {MOST_CLASSES}: number them 0 to "
            "k - 1."
        )
    shapes: dict[str, object] = {}
    for holder, batch in batches.items():
        if task in LABELLED:
            _check_targets(holder, batch.targets, classes)
        else:
            shapes[f"targets of {holder}"] = _check_measures(holder, batch.targets)
        shapes[holder] = _check_inputs(holder, batch, vocabulary_size)
        first = next(name for name in shapes if not name.startswith("targets of "))
        if shapes[holder] != shapes[first]:
            raise DataError(
                f"the inputs of {holder} are {shapes[holder]}, those of {first} {shapes[first]}: "
                f"names, types and shapes (but for the number of examples) must be the same everywhere."
            )


def _check_measures(holder: str, targets: Tensor) -> object:
    """Check targets that are no classes; returns type and shape."""
    if targets.ndim == 0 or len(targets) == 0:
        raise DataError(f"{holder} has no examples.")
    if targets.dtype == torch.float64:
        raise DataError(
            f"the targets of {holder} are float64, but models compute in float32: convert them with .float()."
        )
    if targets.is_floating_point() and not bool(targets.isfinite().all()):
        index = int((~targets.isfinite()).reshape(len(targets), -1).any(1).nonzero()[0])
        raise DataError(f"the target of example {index} of {holder} is not finite (NaN or infinite).")
    return str(targets.dtype), tuple(targets.shape[1:])


def check_labels(holder: str, labels: Int[Tensor, " examples"], classes: int) -> None:
    """Raise DataError, naming the first one, when a label is not one of 0 ... classes - 1."""
    wrong = ((labels < 0) | (labels >= classes)).nonzero()
    if len(wrong):
        index = int(wrong[0])
        raise DataError(
            f"example {index} of {holder} has label {int(labels[index])}, "
            f"but with {classes} classes labels go from 0 to {classes - 1}."
        )


def _check_targets(holder: str, targets: Tensor, classes: int) -> None:
    if len(targets) == 0:
        raise DataError(f"{holder} has no examples.")
    if targets.dtype != torch.int64 or targets.ndim not in (1, 2):
        raise DataError(
            f"the targets of {holder} are {targets.dtype} of shape {tuple(targets.shape)}: they must be "
            "int64, one "
            f"label an example [examples] or one token a position [examples, time]."
        )
    if targets.ndim == 1:
        check_labels(holder, targets, classes)
        return
    if bool((targets == IGNORED).all()):
        raise DataError(f"all targets of {holder} are {IGNORED} (ignored): there is nothing to learn.")
    wrong = ((targets != IGNORED) & ((targets < 0) | (targets >= classes))).nonzero()
    if len(wrong):
        example, position = wrong[0].tolist()
        raise DataError(
            f"example {example} of {holder} has token {int(targets[example, position])} at position "
            f"{position}, "
            f"but the vocabulary has {classes} tokens."
        )


def _check_inputs(holder: str, batch: Batch, vocabulary_size: int | None) -> object:
    """Check one holder's inputs; returns names, types and shapes, to be compared with the others'."""
    named = batch.inputs if isinstance(batch.inputs, dict) else dict(enumerate(batch.inputs))
    if not named:
        raise DataError(f"the examples of {holder} have no inputs.")
    for name, tensor in named.items():
        label = f"input {name!r} of {holder}"
        if tensor.ndim == 0 or len(tensor) != len(batch):
            raise DataError(f"{label} has shape {tuple(tensor.shape)}, but there are {len(batch)} targets.")
        if tensor.requires_grad:
            raise DataError(f"{label} requires gradients, but examples are not trained: give input.detach().")
        if tensor.dtype == torch.float64:
            raise DataError(f"{label} is float64, but models compute in float32: convert it with .float().")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            index = int((~tensor.isfinite()).flatten(1).any(1).nonzero()[0]) if tensor.ndim > 1 else 0
            raise DataError(f"{label} is not finite (NaN or infinite) in example {index}.")
        is_tokens = name in (0, "input_ids") and not tensor.is_floating_point()
        if (
            vocabulary_size is not None
            and is_tokens
            and not 0 <= int(tensor.min()) <= int(tensor.max()) < vocabulary_size
        ):
            wrong = int(((tensor < 0) | (tensor >= vocabulary_size)).flatten(1).any(1).nonzero()[0])
            raise DataError(
                f"{label} has a token outside the vocabulary of {vocabulary_size} in example {wrong}."
            )
    return {name: (str(tensor.dtype), tuple(tensor.shape[1:])) for name, tensor in named.items()}
