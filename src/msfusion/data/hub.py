"""Data by Hub name, local folder or file, through `datasets`: which splits there are, and what is in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from msfusion.batch import Batch
from msfusion.data.classified import load_classification
from msfusion.data.columns import column_values, find_columns, kind_of, partition_keys, text_values
from msfusion.data.delimited import Kinds, settings_of, typed_splits
from msfusion.data.loaded import Loaded
from msfusion.data.measured import load_measured
from msfusion.data.running_text import load_running_text
from msfusion.data.sources import local_source, reader_of, refuse_other_than_hub
from msfusion.data.spec import DataSpec
from msfusion.errors import ConfigError, DataError
from msfusion.extras import needing
from msfusion.imports import in_one_line

TEST_SPLITS = ("test", "validation", "valid", "dev")


def load_hub(spec: DataSpec) -> Loaded:
    """The training and test examples of a Hub data set, a local folder in the Hub's layout, or a single file.

    Images become float32 [examples, channels, height, width]; text to be classified int64 [examples, length],
    padded with id 0; running text int64 blocks [examples, length] with the next tokens as targets; lists of
    numbers float32. With the task `regression` targets are float32 as well (`data.measured`).
    Raises ConfigError without `datasets`; DataError for a missing folder, split, column, or label.
    """
    if spec.task == "other":
        raise ConfigError(
            "data.task = 'other' is for data.source = 'module:function', which makes the targets."
        )
    train, test = _splits(spec)
    columns = find_columns(train, spec)
    by = spec.partition_column
    keys = None if by is None else partition_keys(train, by, "the training split")
    if columns.label is None:
        if columns.kind != "text":
            raise DataError(
                f"data.task = 'language_modelling' needs a column of text, not {columns.input!r}."
            )
        texts = text_values(train, columns.input, "the training split")
        test_texts = None if test is None else text_values(test, columns.input, "the test split")
        return load_running_text(texts, test_texts, keys, spec, columns.input)
    load = load_measured if spec.task == "regression" else load_classification
    return load(train, test, columns, keys, spec)


def load_own_split(source: str, participant: int, spec: DataSpec) -> Batch:
    """A participant's own examples, from the training split of `source`, encoded as those of `spec.source` are.

    They are read as the test split of `spec.source` would be: by the labels, words and pixels of its training split.
    Raises DataError, naming the participant, where they cannot be.
    """
    reference, _ = _splits(spec)
    columns = find_columns(reference, spec)
    holder = f"participant {participant}"
    own = _own_rows(source, participant, spec, columns.label, kinds_in(reference))
    for name in filter(None, (*columns.inputs, columns.label)):
        if name not in own.features:
            raise DataError(
                f"the data of {holder} ({source}) has no column '{name}', as that of data.source has; it has "
                f"{', '.join(own.features)}."
            )
    limits = replace(spec, max_test=spec.max_train)
    if columns.label is None:
        texts = text_values(reference, columns.input, "the training split")
        return load_running_text(texts, text_values(own, columns.input, holder), None, limits).test
    load = load_measured if spec.task == "regression" else load_classification
    return load(reference, own, columns, None, limits, holder).test


def kinds_in(split: Any) -> dict[str, str]:
    """Which of its columns hold texts, and which numbers: others that are to be like it hold the same."""
    kinds = {name: kind_of(feature) for name, feature in split.features.items()}
    return {name: kind for name, kind in kinds.items() if kind in ("text", "number")}


def _own_rows(source: str, participant: int, spec: DataSpec, label: str | None, kinds: Kinds) -> Any:
    """The training split of a participant's own source."""
    place = replace(spec, source=source)
    if not Path(source).expanduser().exists():  # nobody else is told what private data is called
        raise DataError(
            f"data.own of participant {participant} = '{source}': there is no such folder or file (seen from "
            f"{Path.cwd()})."
        )
    try:
        splits = open_splits(place, kinds=kinds)
        if spec.train_split in splits and label not in (None, *splits[spec.train_split].features):
            splits = open_splits(place, labels=True)
    except DataError as error:
        told = str(error).replace("data.source =", f"data.own of participant {participant} =")
        raise DataError(told) from error
    if spec.train_split not in splits:
        raise DataError(
            f"the data of participant {participant} ({source}) has no split '{spec.train_split}'; it has "
            f"{', '.join(splits)}."
        )
    return splits[spec.train_split]


def _splits(spec: DataSpec) -> tuple[Any, Any | None]:
    """The training split, and the test split where there is one."""
    splits = open_splits(spec)
    if spec.train_split not in splits:
        raise DataError(
            f"{spec.source} has no split '{spec.train_split}' to train on; it has {', '.join(splits)}."
        )
    if spec.test_split is not None and spec.test_split not in splits:
        raise DataError(
            f"{spec.source} has no split '{spec.test_split}' to test on; it has {', '.join(splits)}."
        )
    train = splits[spec.train_split]
    if len(train) == 0:
        raise DataError(f"the split '{spec.train_split}' of {spec.source} has no examples.")
    if spec.test_split is not None:
        if len(splits[spec.test_split]) == 0:
            raise DataError(f"the split '{spec.test_split}' of {spec.source} has no examples.")
        return train, splits[spec.test_split]
    for name in TEST_SPLITS:
        if name in splits and name != spec.train_split and not _labels_hidden(splits[name], train, spec):
            return train, splits[name]
    return train, None


def _labels_hidden(split: Any, train: Any, spec: DataSpec) -> bool:
    """Whether a test split is of no use: without examples or with all labels -1, as those of GLUE."""
    label = find_columns(train, spec).label
    if len(split) == 0:
        return True
    if label is None:
        return False
    if label not in split.features:
        return True
    values = column_values(split, label)
    if spec.task == "regression":  # of which -1 is one like others
        return all(value is None for value in values)
    hidden = all(value is None or value == -1 for value in values)
    return hidden and -1 not in column_values(train, label)


def open_splits(spec: DataSpec, labels: bool = False, kinds: Kinds | None = None) -> Any:
    """All splits of a source. `labels`: those of a folder's folders too where they are all of one class.

    `kinds`: what columns of CSV hold, where other data has said it.
    """
    with needing("data", f"data.source = '{spec.source}'"):
        import datasets
    source = local_source(spec.source)
    name, arguments = spec.source, dict[str, Any]()
    try:
        if source is not None:
            name, arguments = reader_of(source, spec, str(datasets.config.HF_DATASETS_CACHE))
        if source is not None and (source / "dataset_dict.json").exists():  # as `save_to_disk` writes it
            return datasets.load_from_disk(str(source))
        with _quiet(datasets, source is not None):
            make = datasets.load_dataset_builder
            safely = {"trust_remote_code": False} if "trust_remote_code" in signature(make).parameters else {}
            builder = make(name, spec.subset, **arguments, **safely)
            if source is None:
                refuse_other_than_hub(builder, spec)
            if labels and hasattr(builder.config, "drop_labels"):
                arguments |= {"drop_labels": False}
            delimited = hasattr(builder.config, "keep_default_na")
            if delimited:
                arguments |= settings_of(builder.config)
            splits = datasets.load_dataset(name, spec.subset, **arguments, trust_remote_code=False)
            return typed_splits(splits, spec, kinds) if delimited else splits
    except DataError:
        raise
    except Exception as error:  # from many libraries: network, parquet, missing configurations
        where = "no folder of that name, and from the Hub it"
        if source is not None:
            where = "this folder" if source.is_dir() else "this file"
        # what it generates from says more than that it could not be generated
        said = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise DataError(
            f"data.source = '{spec.source}': {where} cannot be loaded ({in_one_line(said)})."
        ) from error


@contextlib.contextmanager
def _quiet(datasets: Any, quiet: bool) -> Iterator[None]:
    """Without the progress bars of reading local files."""
    shown = quiet and datasets.is_progress_bar_enabled()
    if shown:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
