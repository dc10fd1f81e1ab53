"""Data by Hub name or local folder, through `datasets`: which splits there are, and what is in them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from msfusion.data.classified import load_classification
from msfusion.data.columns import column_values, find_columns
from msfusion.data.loaded import Loaded
from msfusion.data.running_text import load_running_text
from msfusion.data.spec import DataSpec
from msfusion.errors import ConfigError, DataError
from msfusion.imports import in_one_line

TEST_SPLITS = ("test", "validation", "valid", "dev")


def load_hub(spec: DataSpec) -> Loaded:
    """The training and test examples of a Hub data set or a local folder in the Hub's layout.

    Images become float32 [examples, channels, height, width]; text to be classified int64 [examples, length],
    padded with id 0; running text int64 blocks [examples, length] with the next tokens as targets; lists of
    numbers float32.
    Raises ConfigError without `datasets`; DataError for a missing folder, split, column, or label.
    """
    train, test = _splits(spec)
    columns = find_columns(train, spec)
    keys = None if spec.partition_column is None else np.array(column_values(train, spec.partition_column))
    if columns.label is None:
        if columns.kind != "text":
            raise DataError(
                f"data.task = 'language_modelling' needs a column of text, not {columns.input!r}."
            )
        test_texts = None if test is None else column_values(test, columns.input)
        return load_running_text(column_values(train, columns.input), test_texts, keys, spec)
    return load_classification(train, test, columns, keys, spec)


def _splits(spec: DataSpec) -> tuple[Any, Any | None]:
    """The training split, and the test split where there is one."""
    splits = _open(spec)
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
    return label is not None and (
        label not in split.features or set(column_values(split, label)) <= {-1, None}
    )


def _open(spec: DataSpec) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.source = '{spec.source}' needs datasets: pip install 'msfusion[data]'."
        ) from error
    folder = Path(spec.source).expanduser()
    if not folder.exists() and (spec.source.startswith((".", "/", "~")) or spec.source.count("/") > 1):
        raise DataError(f"data.source = '{spec.source}': there is no such folder (seen from {Path.cwd()}).")
    try:
        if (folder / "dataset_dict.json").exists():  # as `save_to_disk` writes it
            return datasets.load_from_disk(str(folder))
        with _quiet(datasets, folder.exists()):
            return datasets.load_dataset(str(folder) if folder.exists() else spec.source, spec.subset)
    except Exception as error:  # from many libraries: network, parquet, scripts, missing configurations
        where = "this folder" if folder.exists() else "no folder of that name, and from the Hub it"
        raise DataError(
            f"data.source = '{spec.source}': {where} cannot be loaded ({in_one_line(error)})."
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
