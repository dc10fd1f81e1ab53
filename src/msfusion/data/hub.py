"""Data by Hub name or local folder, through `datasets`: splits, columns, and their conversion to tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msfusion.batch import Batch
from msfusion.data.builtin import stratified
from msfusion.data.images import decode_images, normalised
from msfusion.data.loaded import Loaded, check_labels
from msfusion.data.running_text import load_running_text
from msfusion.data.spec import DataSpec
from msfusion.data.text import encode_texts, padded
from msfusion.errors import ConfigError, DataError

LABEL_NAMES = ("label", "labels", "fine_label", "coarse_label", "target", "class", "intent")
TEXT_NAMES = ("text", "sentence", "content", "review", "question", "document")
TEST_SPLITS = ("test", "validation", "valid", "dev")


@dataclass(frozen=True)
class Columns:
    """Which columns are used: the input and its kind (`image`, `text` or `numbers`), and the label if any."""

    input: str
    kind: str
    label: str | None


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
    return _classification(train, test, columns, keys, spec)


def column_values(split: Any, column: str) -> list[Any]:
    """All values of a column, images undecoded. Raises DataError, listing the columns, if it is missing."""
    if column not in split.column_names:
        raise DataError(
            f"there is no column '{column}' in the data; there are {', '.join(split.column_names)}."
        )
    if type(split.features[column]).__name__ == "Image":
        from datasets import Image

        split = split.cast_column(column, Image(decode=False))
    values: list[Any] = split.select_columns([column]).with_format("arrow")[:][column].to_pylist()
    return values


def find_columns(split: Any, spec: DataSpec) -> Columns:
    """Which columns hold inputs and labels: as `spec` says, or by type and usual names; or DataError."""
    features = split.features
    for name in (spec.input_column, spec.label_column, spec.partition_column):
        if name is not None and name not in features:
            raise DataError(f"there is no column '{name}' in {spec.source}; there are {', '.join(features)}.")
    label = spec.label_column or _guess_label(features)
    if spec.task == "language_modelling":
        label = None
    if spec.task == "classification" and label is None:
        raise DataError(
            f"no label column found in {spec.source}: set data.label_column to one of {', '.join(features)}."
        )
    kinds = {
        name: _kind(feature)
        for name, feature in features.items()
        if name not in (label, spec.partition_column)
    }
    chosen = spec.input_column or _guess_input(kinds)
    kind = _kind(features[chosen]) if chosen is not None else None
    if chosen is None or kind is None:
        raise DataError(
            f"no column of images, text or numbers found in {spec.source}: set data.input_column to one of "
            f"{', '.join(features)}."
        )
    return Columns(chosen, kind, label)


def _kind(feature: Any) -> str | None:
    """What a column holds: image, text, numbers (lists of them), or None: nothing that a model could read."""
    kind = type(feature).__name__
    if kind == "Image":
        return "image"
    if kind == "Value" and feature.dtype in ("string", "large_string"):
        return "text"
    return "numbers" if kind in ("List", "Sequence", "LargeList", "Array2D", "Array3D") else None


def _guess_label(features: Any) -> str | None:
    classes = [name for name, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    return next((name for name in (*LABEL_NAMES, *classes) if name in features), None)


def _guess_input(kinds: dict[str, str | None]) -> str | None:
    """The first image column, or else text under a usual name, or else any text, or else lists of numbers."""
    for wanted in ("image", "text", "numbers"):
        names = [name for name, kind in kinds.items() if kind == wanted]
        if names:
            return next((name for name in TEXT_NAMES if name in names), names[0])
    return None


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
        reason = " ".join(str(error).split())[:300]
        where = "this folder" if folder.exists() else "no folder of that name, and from the Hub it"
        raise DataError(f"data.source = '{spec.source}': {where} cannot be loaded ({reason}).") from error


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


def _classification(train: Any, test: Any | None, columns: Columns, keys: Any, spec: DataSpec) -> Loaded:
    assert columns.label is not None
    train_labels, names = _labels(train, columns.label, None, "the training split")
    if test is None:
        kept, held_out = stratified(train_labels, spec.test_share or 0.2, spec.seed)
        test, test_labels = train, train_labels
    else:
        kept, held_out = torch.arange(len(train)), torch.arange(len(test))
        test_labels, _ = _labels(test, columns.label, names, "the test split")
    train_rows, test_rows = _chosen(kept, spec.max_train, spec), _chosen(held_out, spec.max_test, spec)
    size, padding = None, None
    if columns.kind == "image":
        train_inputs, test_inputs = _images(train, test, columns, train_rows, test_rows, spec)
    elif columns.kind == "numbers":
        train_inputs, test_inputs = (
            _numbers(s, columns.input, r) for s, r in ((train, train_rows), (test, test_rows))
        )
    else:
        train_texts, test_texts = (
            _texts(train, columns.input, train_rows),
            _texts(test, columns.input, test_rows),
        )
        tokenizer = spec.tokenizer or "words"
        train_ids, test_ids, encoder = encode_texts(tokenizer, train_texts, test_texts, spec.vocabulary_size)
        train_inputs = padded(train_ids, spec.length, encoder)
        test_inputs = padded(test_ids, spec.length, encoder)
        size, padding = encoder.size, encoder.padding
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
        vocabulary_size=size,
        padding=padding,
    )


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
