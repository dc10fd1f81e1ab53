"""What a configuration may begin with for somebody's files: which columns are inputs and labels, and what they ask for.

`msfusion init` writes it down, where everybody can see and change it; nothing is guessed when a run begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msfusion.data.columns import TEXT_NAMES, column_values, is_missing, kind_of, label_column
from msfusion.data.hub import open_splits
from msfusion.data.labels import MANY
from msfusion.data.spec import DataSpec
from msfusion.data.table import MOST_WORDS

MOST_ROWS = 20_000
"""Rows that are looked at: a longer file says the same."""


@dataclass(frozen=True)
class Suggestion:
    """Settings by their dotted keys, and sentences about what is not clear."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()


def suggested(source: str) -> Suggestion:
    """What to begin with for a local file or folder. Raises DataError where it cannot be read, ConfigError without
    `datasets`.
    """
    spec = DataSpec(source=source)
    splits = open_splits(spec)
    rows = splits[spec.train_split] if spec.train_split in splits else next(iter(splits.values()))
    rows = rows.select(range(min(len(rows), MOST_ROWS)))
    kinds = {name: kind_of(feature) for name, feature in rows.features.items()}
    label = label_column(rows.features)
    inputs = {name: kind for name, kind in kinds.items() if name != label}
    if "image" in inputs.values():
        return _pictures(label)
    texts = [name for name, kind in inputs.items() if kind == "text"]
    numbers = [name for name, kind in inputs.items() if kind == "number"]
    usual = next((name for name in TEXT_NAMES if name in texts), None)
    if usual is not None or (len(texts) == 1 and not numbers):
        return _texts(usual or texts[0], label)
    if texts or len(numbers) > 1:
        return _table(rows, [*numbers, *texts], label)
    return Suggestion({"model.name": "mlp"} if "numbers" in inputs.values() else {})


def _pictures(label: str | None) -> Suggestion:
    if label is not None:
        return Suggestion()
    return Suggestion({}, ["no column holds labels: put the images into a folder for each class"])


def _texts(text: str, label: str | None) -> Suggestion:
    named = {} if text in TEXT_NAMES else {"data.input_column": text}
    if label is None:
        return Suggestion({"data.task": "language_modelling", **named, "model.name": "decoder_lm"})
    return Suggestion({**named, "model.name": "text_classifier"})


def _table(rows: Any, columns: Sequence[str], label: str | None) -> Suggestion:
    """All columns that a table can have as inputs; the last one is the label where none is called so."""
    remarks, settings = list[str](), dict[str, Any]()
    if label is None:
        label = [name for name in rows.features if name in columns][-1]
        settings["data.label_column"] = label
        remarks.append(
            f"no column is called as labels are, so '{label}', the last one, is taken: look at label_column"
        )
    values = {name: column_values(rows, name) for name in columns if name != label}
    named = {name: len(set(each)) for name, each in values.items() if kind_of(rows.features[name]) == "text"}
    left_out = [name for name, count in named.items() if count > MOST_WORDS or count == len(rows) > 1]
    remarks += [f"'{name}' has {named[name]} different words and is left out" for name in left_out]
    empty = [name for name, each in values.items() if name not in left_out and any(map(is_missing, each))]
    remarks += [f"'{name}' has empty cells: fill them, or leave it out of input_column" for name in empty]
    settings["data.input_column"] = [name for name in values if name not in left_out]
    if _is_measured(rows, label):
        settings |= {"data.task": "regression"}
        remarks.append(
            f"'{label}' is to be predicted as a number (task): bring it to about -1 ... 1 beforehand"
        )
    return Suggestion({**settings, "model.name": "mlp"}, remarks)


def _is_measured(rows: Any, label: str) -> bool:
    """Whether labels are amounts rather than classes: numbers with a part behind the point, or very many of them."""
    if kind_of(rows.features[label]) != "number" or rows.features[label].dtype == "bool":
        return False
    values = [value for value in column_values(rows, label) if not is_missing(value)]
    return len(set(values)) > MANY or not all(float(value).is_integer() for value in values)
