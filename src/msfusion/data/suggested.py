"""What a configuration may begin with for somebody's files: which columns are inputs and labels, and what they ask for.

`msfusion init` writes it down, where everybody can see and change it; nothing is guessed when a run begins. Whatever is
guessed is said.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msfusion.data.columns import TEXT_NAMES, column_values, is_missing, kind_of, label_column
from msfusion.data.hub import kinds_in, open_splits
from msfusion.data.labels import MANY
from msfusion.data.spec import DataSpec
from msfusion.data.table import MOST_WORDS
from msfusion.errors import DataError

MOST_ROWS = 20_000
"""Rows that are looked at: a longer file says the same."""
WORDS_OF_A_TEXT = 3
"""A column whose cells have so many words in the mean holds texts; one with fewer, words of a table."""


@dataclass(frozen=True)
class Suggestion:
    """Settings by their dotted keys, and sentences about what was guessed."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()


def suggested(source: str) -> Suggestion:
    """What to begin with for a local file or folder. Raises DataError where it cannot be read, or no column can be an
    input; ConfigError without `datasets`.
    """
    spec = DataSpec(source=source)
    splits = open_splits(spec)
    rows = splits[spec.train_split] if spec.train_split in splits else next(iter(splits.values()))
    rows = rows.select(range(min(len(rows), MOST_ROWS)))
    label = label_column(rows.features)
    kinds = {kind_of(feature) for name, feature in rows.features.items() if name != label}
    if "image" in kinds:
        without = "no column holds labels: put the images into a folder for each class"
        return Suggestion({}, () if label is not None else (without,))
    values = {name: column_values(rows, name) for name in kinds_in(rows) if name != label}
    text = _text_among(values)
    if text is not None:
        return _texts(text, label, values)
    if values:
        return _table(rows, label, values)
    return Suggestion({"model.name": "mlp"} if "numbers" in kinds else {})


Values = Mapping[str, Sequence[Any]]


def _text_among(values: Values) -> str | None:
    """The column of texts: one that is called so, or else that with most words in a cell, if it has several."""
    usual = next((name for name in TEXT_NAMES if name in values), None)
    if usual is not None:
        return usual
    lengths = {
        name: _words(each) for name, each in values.items() if any(isinstance(one, str) for one in each)
    }
    longest = max(lengths, key=lambda name: lengths[name], default=None)
    if longest is None:
        return None
    return longest if lengths[longest] >= WORDS_OF_A_TEXT or len(values) == 1 else None


def _words(values: Sequence[Any]) -> float:
    return statistics.fmean([len(each.split()) for each in values if isinstance(each, str)] or [0])


def _texts(text: str, label: str | None, values: Values) -> Suggestion:
    remarks, settings = list[str](), dict[str, Any]()
    classes = [name for name in values if name != text and _is_of_classes(values[name])]
    if label is None and classes:
        label = settings["data.label_column"] = classes[-1]
        remarks.append(f"no column is named like a label: took '{label}', which has few different values")
    others = [name for name in values if name not in (text, label)]
    if others:
        remarks.append(f"took '{text}' as the texts; not used: {', '.join(map(repr, others))}")
    if label is None:
        settings["data.task"] = "language_modelling"
        remarks.append(
            f"there is no column of labels, so a model is to learn the texts of '{text}' themselves"
        )
    if text not in TEXT_NAMES and (others or label is not None):
        settings["data.input_column"] = text
    model = "decoder_lm" if label is None else "text_classifier"
    return Suggestion({**settings, "model.name": model}, remarks)


def _is_of_classes(values: Sequence[Any]) -> bool:
    """Whether a column may be one of labels: few values, each of them several times."""
    different = len({each for each in values if not is_missing(each)})
    return 2 <= different <= min(MANY, len(values) // 3)


def _table(rows: Any, label: str | None, values: Values) -> Suggestion:
    """All columns that a table can have as inputs; the last one is the label where none is called so."""
    remarks, settings = list[str](), dict[str, Any]()
    if label is None and len(values) > 1:
        label = settings["data.label_column"] = list(values)[-1]
        remarks.append(f"no column is named like a label: took the last one, '{label}'")
    inputs = {name: each for name, each in values.items() if name != label}
    words = [name for name in inputs if kind_of(rows.features[name]) == "text"]
    named = {name: len(set(inputs[name])) for name in words}
    left_out = [name for name, count in named.items() if count > MOST_WORDS or count == len(rows) > 1]
    remarks += [f"left out '{name}', which has {named[name]} different values" for name in left_out]
    numbered = [name for name in inputs if name not in words and _numbers_rows(name, inputs[name])]
    remarks += [f"left out '{name}', which numbers the rows" for name in numbered]
    chosen = [name for name in inputs if name not in (*left_out, *numbered)]
    if not chosen or label is None:
        raise DataError(
            f"there are no columns for inputs and a label: the data has {', '.join(map(repr, rows.features))}. Write "
            "a configuration without --data, and set data.input_column and data.label_column in it."
        )
    empty = [name for name in chosen if any(map(is_missing, inputs[name]))]
    remarks += [f"'{name}' has empty cells: fill them, or leave it out of input_column" for name in empty]
    settings["data.input_column"] = chosen
    if _is_measured(rows, label):
        settings |= {"data.task": "regression"}
        remarks.append(f"'{label}' is to be predicted as a number (task)")
    return Suggestion({**settings, "model.name": "mlp"}, remarks)


def _numbers_rows(name: str, values: Sequence[Any]) -> bool:
    """Whether a column says which row it is: 0, 1, 2 or 1, 2, 3 and so on, or called so and never twice the same."""
    whole = all(isinstance(each, int) and not isinstance(each, bool) for each in values)
    if not whole or len(set(values)) < len(values) or len(values) < 2:
        return False
    called = name.lower() in ("id", "index", "row", "number") or name.lower().endswith(("_id", " id"))
    return called or list(values) in (list(range(len(values))), list(range(1, len(values) + 1)))


def _is_measured(rows: Any, label: str) -> bool:
    """Whether labels are amounts rather than classes: numbers with a part behind the point, or very many of them."""
    if kind_of(rows.features[label]) != "number" or rows.features[label].dtype == "bool":
        return False
    values = [value for value in column_values(rows, label) if not is_missing(value)]
    return len(set(values)) > MANY or not all(float(value).is_integer() for value in values)
