"""Examples that a trained model has never seen, read from files as its training data was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msfusion.batch import Batch
from msfusion.data.builtin import read_digits, stratified
from msfusion.data.columns import column_values
from msfusion.data.hub import TEST_SPLITS, open_splits
from msfusion.data.inputs import Chosen, ImageEncoding, RunningTextEncoding
from msfusion.data.measured import targets_of
from msfusion.data.preprocessing import Preprocessing
from msfusion.data.sources import READERS
from msfusion.data.spec import DataSpec
from msfusion.data.text import blocks
from msfusion.errors import ConfigError, DataError
from msfusion.extras import needing
from msfusion.imports import in_one_line

DIGITS = "digits"
"""The built-in digits, of which the test set is meant."""


@dataclass(frozen=True)
class Unseen:
    """Inputs, what each example is called, and its target where the source says it.

    kind: what the names are of: "file", the path of each image in the source; "row", "image" or "block", names such as
    "row 1", counted from 1.
    """

    inputs: Tensor
    names: tuple[str, ...]
    targets: Tensor | None
    kind: str

    @property
    def batch(self) -> Batch:
        """The examples; without targets with zeros in their place."""
        targets = torch.zeros(len(self.inputs), dtype=torch.int64) if self.targets is None else self.targets
        return Batch((self.inputs,), targets)


Source = str | Path | Iterable[Any]
"""A folder or file, or the examples themselves: texts, paths of images, rows (dicts) of a table, lists of numbers."""


def load_unseen(source: Source, preprocessing: Preprocessing, split: str | None = None) -> Unseen:
    """The examples of a source, in its order.

    Of a folder with several splits it is the test split, unless `split` says which. Targets are there where the source
    has the column of labels that training had, and not all of them are missing.
    Raises DataError for what cannot be read, has not the columns of the training data, or a label that is no class.
    """
    if isinstance(source, str) and source == DIGITS and preprocessing.label_column == "label":
        return _digits(preprocessing)
    if isinstance(source, str | Path):
        rows, holder = _rows(Path(source).expanduser(), preprocessing, split), str(source)
    else:
        rows, holder = _made(source, preprocessing), "these examples"
    for name in preprocessing.inputs.columns:
        if name not in rows.features:
            raise DataError(
                f"{holder} has no column '{name}', as the training data had; it has {', '.join(rows.features)}."
            )
    if not len(rows):
        raise DataError(f"{holder} has no examples.")
    try:
        inputs = preprocessing.inputs.read(Chosen.all_of(rows, holder))
    except DataError as error:
        told = str(error).replace("set data.image_size to", "add --resize (in Python: resize=True) to")
        raise DataError(told) from error
    if isinstance(preprocessing.inputs, RunningTextEncoding):
        batch = blocks(inputs, preprocessing.inputs.length)
        assert isinstance(batch.inputs, tuple)
        return Unseen(batch.inputs[0], _counted("block", range(len(batch))), batch.targets, "block")
    targets = _targets(rows, preprocessing, holder)
    files = _files(rows, preprocessing, source)
    if files is not None:
        return Unseen(inputs, files, targets, "file")
    return Unseen(inputs, _counted("row", range(len(rows))), targets, "row")


def _counted(kind: str, indices: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"{kind} {index + 1}" for index in indices)


def _digits(preprocessing: Preprocessing) -> Unseen:
    encoding = preprocessing.inputs
    if not isinstance(encoding, ImageEncoding) or (encoding.height, encoding.width) != (8, 8):
        raise DataError(f"'{DIGITS}' are images of 8x8 pixels, which this model was not trained on.")
    images, labels = read_digits()
    _, test = stratified(labels, 0.2, seed=0)
    names = _counted("image", test.tolist())  # of all digits, as scikit-learn has them
    return Unseen(encoding.encode(images[test]), names, labels[test], "image")


def _rows(source: Path, preprocessing: Preprocessing, split: str | None) -> Any:
    """The rows of a file or folder as `datasets` has them."""
    if not source.exists():
        raise DataError(f"{source}: there is no such folder or file (seen from {Path.cwd()}).")
    single = source.is_file() and source.suffix.lower() not in READERS
    if isinstance(preprocessing.inputs, ImageEncoding) and single:
        return _made([source], preprocessing)
    label = preprocessing.label_column
    spec = DataSpec(str(source), label_column=label)
    try:
        splits = open_splits(spec, kinds=preprocessing.kinds)
        name = _chosen_split(splits, split, source)
        if label is not None and label not in splits[name].features:
            splits = _labelled(spec, splits, name, preprocessing)
    except DataError as error:
        raise DataError(str(error).replace("data.source = ", "")) from error
    return splits[name]


def _chosen_split(splits: Mapping[str, Any], asked: str | None, source: Path) -> str:
    if asked is not None and asked not in splits:
        raise DataError(f"{source} has no split '{asked}'; it has {', '.join(splits)}.")
    usual = [name for name in TEST_SPLITS if name in splits]
    if asked is None and not usual and len(splits) > 1:
        raise DataError(f"{source} has the splits {', '.join(splits)}: say which (--split).")
    return asked or next(iter([*usual, *splits]))


def _labelled(spec: DataSpec, splits: Any, name: str, preprocessing: Preprocessing) -> Any:
    """The splits with folders' names as labels: `datasets` drops them where there is one alone.

    Images that lie in the folder itself have its name then, which is a label only where it is a class.
    """
    again, label = open_splits(spec, labels=True), preprocessing.label_column
    known = set(() if preprocessing.classes is None else preprocessing.classes.names)
    names = getattr(again[name].features.get(label), "names", None) if name in again else None
    itself = names == [Path(spec.source).resolve().name]
    return again if names and (set(names) <= known or not itself) else splits


def _made(examples: Iterable[Any], preprocessing: Preprocessing) -> Any:
    """Examples that a program has at hand, as rows. Raises DataError for what is no list of examples."""
    if (
        isinstance(examples, Mapping | bytes)
        or hasattr(examples, "iloc")
        or not isinstance(examples, Iterable)
    ):
        raise DataError(
            f"these examples are of the type {type(examples).__name__}: give a list, such as [row] of one row, or "
            "frame.to_dict('records') of a pandas.DataFrame."
        )
    if not (examples := list(examples)):
        raise DataError("these examples are none: the list is empty.")
    with needing("data", "reading examples"):
        import datasets
    column, encoding = preprocessing.inputs.columns[0], preprocessing.inputs
    if isinstance(encoding, ImageEncoding):
        cells = [{"path": str(each), "bytes": None} for each in examples]
        return datasets.Dataset.from_dict({column: cells}).cast_column(column, datasets.Image(encoding.mode))
    rows = [each if isinstance(each, Mapping) else {column: each} for each in examples]
    try:
        return datasets.Dataset.from_list([dict(row) for row in rows])
    except Exception as error:  # pyarrow raises many kinds
        raise DataError(f"these examples make no table: {in_one_line(error)}.") from error


def _files(rows: Any, preprocessing: Preprocessing, source: Source) -> tuple[str, ...] | None:
    """The file of each image, as it lies in the source; None where examples are no files."""
    if not isinstance(preprocessing.inputs, ImageEncoding):
        return None
    cells = column_values(rows, preprocessing.inputs.column)
    paths = [str((cell or {}).get("path") or "") for cell in cells]
    if not all(paths):
        return None
    folder = Path(source).expanduser().resolve() if isinstance(source, str | Path) else None
    return tuple(_place(Path(path).resolve(), folder) for path in paths)


def _place(path: Path, folder: Path | None) -> str:
    """Where a file lies in a folder; its name alone where that is somewhere else."""
    inside = folder is not None and folder in path.parents
    return str(path.relative_to(folder)) if folder is not None and inside else path.name


def _targets(rows: Any, preprocessing: Preprocessing, holder: str) -> Tensor | None:
    column = preprocessing.label_column
    if column is None or column not in rows.features:
        return None
    classes = preprocessing.classes
    absent = (None,) if classes is None or -1 in classes.values else (None, -1)
    if all(value in absent for value in column_values(rows, column)):
        return None
    if preprocessing.classes is not None:
        return preprocessing.classes.labels_of(rows, holder)
    targets = targets_of(rows, column, holder)
    if targets.shape[1] != preprocessing.outputs:
        raise DataError(
            f"the column '{column}' of {holder} holds {targets.shape[1]} numbers, and the training data had "
            f"{preprocessing.outputs}."
        )
    return targets


def resized(preprocessing: Preprocessing) -> Preprocessing:
    """The same, but images of any size are brought to that of the training images."""
    encoding = preprocessing.inputs
    if not isinstance(encoding, ImageEncoding) or encoding.height != encoding.width:
        raise ConfigError("only a model of square images can have others resized.")
    return replace(preprocessing, inputs=replace(encoding, image_size=encoding.height))
