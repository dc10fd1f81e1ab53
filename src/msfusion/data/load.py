"""`load_data`: from settings to each participant's examples."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from msfusion.batch import Batch
from msfusion.data.builtin import read_digits, read_python_docs, stratified
from msfusion.data.federated import FederatedData
from msfusion.data.function import load_function
from msfusion.data.hub import load_hub
from msfusion.data.inputs import ImageEncoding
from msfusion.data.labels import Classes
from msfusion.data.loaded import Loaded, check_batches
from msfusion.data.own import with_own
from msfusion.data.partition import NEEDS_KEYS, partition
from msfusion.data.preprocessing import Preprocessing
from msfusion.data.running_text import load_running_text
from msfusion.data.spec import TEST_SEED, DataSpec
from msfusion.errors import DataError
from msfusion.imports import is_reference


def load_data(spec: DataSpec | None = None) -> FederatedData:
    """Load data, turn it into tensors, and share it out among participants. Deterministic given the seed.

    Sources: `digits` and `python-docs` (built in); a Hub name or folder (`msfusion.data.hub`);
    `module:function` (`msfusion.data.function`). By default examples are shared out evenly, those of
    `digits` by Dirichlet(0.5), and running text in stretches; with `spec.own` nothing is shared out
    (`msfusion.data.own`).
    Raises ConfigError for impossible settings, DataError for data that cannot be loaded or shared out.
    """
    spec = spec or DataSpec()
    loaded = _load(spec)
    if spec.validation_share is not None:
        loaded = _to_be_validated(loaded, spec.validation_share, spec)
    if spec.own is not None:
        data = with_own(loaded, spec)
    else:
        data = loaded if isinstance(loaded, FederatedData) else _share_out(loaded, spec)
    if not data.participants:
        raise DataError(f"data.source = '{spec.source}' gives no participants.")
    if len(data.participants) != spec.participants:
        raise DataError(
            f"data.source = '{spec.source}' has {len(data.participants)} participants, but "
            "participants.count = "
            f"{spec.participants}: make them equal."
        )
    if spec.task is not None and data.task != spec.task:
        raise DataError(
            f"data.task = '{spec.task}', but data.source = '{spec.source}' is for {data.task.replace('_', ' ')}: leave "
            "data.task out."
        )
    check_batches(data.by_holder, data.classes, data.vocabulary_size, data.task)
    return data


def _load(spec: DataSpec) -> Loaded | FederatedData:
    if spec.source == "digits":
        return _digits(spec)
    if spec.source == "python-docs":
        texts = read_python_docs()
        topics = np.array(list(texts)) if spec.partition_column == "topic" else None
        if spec.partition_column not in (None, "topic"):
            raise DataError(
                f"there is no column '{spec.partition_column}' in python-docs; there are topic, text."
            )
        text_spec = spec if spec.tokenizer else replace(spec, tokenizer="characters")
        return load_running_text(list(texts.values()), None, topics, text_spec)
    return load_function(spec) if is_reference(spec.source) else load_hub(spec)


def _digits(spec: DataSpec) -> Loaded:
    if spec.partition_column is not None:
        raise DataError(f"there is no column '{spec.partition_column}' in digits; there are image, label.")
    images, labels = read_digits()
    train, test = stratified(labels, spec.test_share or 0.2, TEST_SEED)
    if spec.partition != "contiguous":
        train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(spec.seed))]
    train, test = train[: spec.max_train], test[: spec.max_test]
    encoding = ImageEncoding.fitted(images[train], "image", spec, bits=8)
    names = tuple("0123456789")
    return Loaded(
        Batch((encoding.encode(images[train]),), labels[train]),
        Batch((encoding.encode(images[test]),), labels[test]),
        "classification",
        10,
        "digits",
        "digits: 8x8 grey images of handwritten digits, 10 classes",
        keys=labels[train].numpy(),
        label_names=names,
        preprocessing=Preprocessing(
            "classification", encoding, 10, Classes("label", names, tuple(range(10)))
        ),
    )


def _to_be_validated(loaded: Loaded | FederatedData, share: float, spec: DataSpec) -> Loaded:
    """The data with a share of its training examples in place of the test set, and trained on what is left.

    Raises DataError where that leaves one of both empty, or the source itself says which participant has which
    examples.
    """
    if not isinstance(loaded, Loaded):
        raise DataError(
            f"data.validation_share is a share of what data.source has for training, but '{spec.source}' gives each "
            "participant its examples: let it return (train, test), or hold some out there."
        )
    loaded.check()
    kept, held_out = _held_out(loaded, share, spec)
    if not len(kept) or not len(held_out):
        raise DataError(
            f"data.validation_share = {share:g} of {len(loaded.train)} training examples leaves none to "
            f"{'test on' if len(kept) else 'train on'}: choose another share."
        )
    return replace(
        loaded,
        train=loaded.train.take(kept),
        test=loaded.train.take(held_out),
        keys=None if loaded.keys is None else loaded.keys[kept.numpy()],
        description=f"{loaded.description}; tested on {share:g} of the training examples, not on the test set",
    )


def _held_out(loaded: Loaded, share: float, spec: DataSpec) -> tuple[Tensor, Tensor]:
    """Which of the training examples stay, and which are tested on, both in their own order.

    Of classes it is a share of each. Of running text it is the ends of stretches, since neighbours belong together.
    Of others it is any of them, and any are those that `max_test` leaves.
    """
    if loaded.task == "language_modelling":
        chosen = _ends_of_stretches(loaded.keys, len(loaded.train), share)
        return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()[: spec.max_test]
    generator = torch.Generator().manual_seed(spec.seed)
    if loaded.task == "classification":
        kept, held_out = stratified(loaded.train.targets, share, spec.seed)
    else:
        order = torch.randperm(len(loaded.train), generator=generator)
        kept, held_out = order.tensor_split([len(order) - round(share * len(order))])
    some = torch.randperm(len(held_out), generator=generator)[: spec.max_test]
    return kept.sort().values, held_out[some].sort().values


STRETCHES = 20
"""Into how many parts a running text is divided, so that what is tested on comes from all of it."""


def _ends_of_stretches(
    keys: Shaped[np.ndarray, " examples"] | None, count: int, share: float
) -> Bool[Tensor, " examples"]:
    """Which blocks of a text are the ends of its stretches: of those of each key, or of equal ones."""
    chosen = torch.zeros(count, dtype=torch.bool)
    if keys is not None:
        for key in np.unique(keys):
            mine = torch.from_numpy(np.flatnonzero(keys == key))
            chosen[mine[len(mine) - round(share * len(mine)) :]] = True
        return chosen
    bounds = [number * count // STRETCHES for number in range(STRETCHES + 1)]
    for begin, end in pairwise(bounds):
        # rounded so that in all it is just the share
        chosen[end - (round(share * end) - round(share * begin)) : end] = True
    return chosen


def _usual_partition(loaded: Loaded, spec: DataSpec) -> str:
    """Running text in stretches, a user's own examples evenly; unevenly where that is asked for, and the digits.

    Those are there to show what uneven data does.
    """
    if loaded.task == "language_modelling":
        return "contiguous"
    asked = spec.partition_column is not None or spec.alpha != DataSpec.alpha
    return "dirichlet" if loaded.task == "classification" and (asked or spec.source == "digits") else "iid"


def _share_out(loaded: Loaded, spec: DataSpec) -> FederatedData:
    """Give each participant its examples."""
    loaded.check()
    name = spec.partition or _usual_partition(loaded, spec)
    keys = loaded.keys
    if keys is None:
        if name in NEEDS_KEYS:
            raise DataError(
                f"data.partition = '{name}' goes by labels or a column, and this data has neither: set "
                f"data.partition_column, or data.partition to iid or contiguous."
            )
        keys = np.zeros(len(loaded.train), dtype=np.int64)
    parts = [torch.from_numpy(np.asarray(part, dtype=np.int64)) for part in partition(name, keys, spec)]
    if loaded.task == "language_modelling" and name == "iid":  # blocks of text are in order until here
        order = torch.randperm(len(loaded.train), generator=torch.Generator().manual_seed(spec.seed))
        parts = [order[part] for part in parts]
    return loaded.among(tuple(loaded.train.take(part) for part in parts))
