"""CSV and TSV: every cell is text, and what it stands for is decided here, for a column as a whole.

pandas would take the word "NA" for a missing cell, `01` and `1` for one number, and whole numbers beside one with a
decimal point for floats, which merge above 2**53.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from typing import Any

from msfusion.data.columns import label_column
from msfusion.data.spec import DataSpec
from msfusion.errors import DataError

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_LEADING_ZERO = re.compile(r"[+-]?0[0-9]")
_LONGEST = 40
"""From so many characters on, digits are a name."""
_TRUTH = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}
_MISSING = {"", "NA", "N/A", "n/a", "<NA>", "#N/A", "NaN", "nan", "NULL", "null", "None"}
"""What programs write for a missing number. Among texts these are words."""


Kinds = Mapping[str, str]
"""What columns hold, where that is known: `text`, or `number`. The cells of a file decide about the others."""


def settings_of(config: Any) -> dict[str, Any]:
    """How `datasets` is to read CSV: every cell stays text, and no word is a missing one.

    Raises DataError where rows have more cells than the header: pandas would take the first for a name of the row, and
    each of the others for that of the column to its left.
    """
    import pandas

    first, file = None, ""
    with suppress(Exception):  # an archive, or a file that cannot be read, of which `datasets` says more
        file = str(next(iter(config.data_files.values()))[0])
        first = pandas.read_csv(file, sep=config.sep, encoding=config.encoding, nrows=1, dtype=str)
    if first is None:
        return {"keep_default_na": False, "converters": None}
    if len(first) and not isinstance(first.index, pandas.RangeIndex):
        raise DataError(
            f"the rows of {file} have more cells than its header: give each column a name, and leave no separator at "
            "the end of a row."
        )
    return {"keep_default_na": False, "converters": dict.fromkeys(first.columns, str) or None}


def typed_splits(splits: Mapping[str, Any], spec: DataSpec, kinds: Kinds | None = None) -> dict[str, Any]:
    """The splits with columns of numbers as numbers, missing ones null. A column has one type in all splits.

    `kinds` are those that other data had, as which these are to be read: by its own cells alone a file with the words
    "1" and "2" would have numbers in a column in which the others have "3b" as well.
    Raises DataError for labels, or values to share out by, that are numbers but for some words for missing ones.
    """
    kinds = kinds or {}
    found = dict(splits)
    columns = next(iter(found.values())).column_names
    used = _used(columns, spec)
    if spec.task == "regression":  # whose labels are numbers, however large
        kinds = {**dict.fromkeys(_label(columns, spec), "number"), **kinds}
    for column in columns:
        if not all(_is_text(split, column) for split in found.values()):
            continue
        cells = {name: split.with_format("arrow")[:][column].to_pylist() for name, split in found.items()}
        kind = kinds.get(column)
        if column in used and kind != "text":
            _refuse_words_among_numbers(cells, column)
        texts = [cell for each in cells.values() for cell in each]
        values = texts if kind == "text" else _typed(texts, kind == "number", column not in used)
        if values is texts and column not in used:
            continue  # an empty cell among texts is an empty text
        rows = iter(values)
        for name, split in found.items():
            own = [next(rows) or None if values is texts else next(rows) for _ in range(len(split))]
            found[name] = _with_column(split, column, own, values)
    return found


def _used(columns: Sequence[str], spec: DataSpec) -> list[str]:
    """The columns whose values are told apart one by one: labels, and what a partition goes by."""
    return [column for column in columns if column in (*_label(columns, spec), spec.partition_column)]


def _label(columns: Sequence[str], spec: DataSpec) -> list[str]:
    """The column of labels, where there is one."""
    label = None if spec.task == "language_modelling" else spec.label_column or label_column(columns)
    return [] if label is None else [label]


def _is_text(split: Any, column: str) -> bool:
    return getattr(split.features[column], "dtype", None) in ("string", "large_string")


def _is_number(text: str) -> bool:
    return len(text) <= _LONGEST and _NUMBER.fullmatch(text) is not None and not _LEADING_ZERO.match(text)


def _refuse_words_among_numbers(cells: Mapping[str, Sequence[str]], column: str) -> None:
    texts = {text.strip() for each in cells.values() for text in each}
    words = (texts & _MISSING) - {""}
    if not words or not texts - _MISSING or not all(map(_is_number, texts - _MISSING)):
        return
    name, row = next(
        (name, row) for name, each in cells.items() for row, text in enumerate(each) if text.strip() in words
    )
    raise DataError(
        f"example {row} of the split '{name}' has {cells[name][row]!r} in the column '{column}', whose other values "
        "are numbers: leave such rows out if it is missing, or write all values as words if it is one of them."
    )


def _typed(texts: Sequence[str], as_number: bool, inputs: bool) -> Sequence[Any]:
    """Whole numbers, numbers or truth values, with None where one is missing; else the texts themselves.

    `as_number`: they are numbers, so that whole ones too large for 64 bits are no names. Among `inputs` only plain
    digits are: the masses of stars, 2e30 kilograms, may all be whole. What values are told apart by is a name as soon
    as one has an exponent: 12e3 and 12e03 may be two of them.
    """
    stripped = [text.strip() for text in texts]
    known = [text for text in stripped if text not in _MISSING]
    if not known:
        return texts if any(stripped) else [None] * len(texts)
    if all(text in _TRUTH for text in known):
        return [_TRUTH.get(text) for text in stripped]
    exponents = any("e" in text.lower() for text in known)
    if not all(map(_is_number, known)) or (exponents and not (as_number or inputs)):
        return texts
    numbers = [None if text in _MISSING else Decimal(text) for text in stripped]
    there = [number for number in numbers if number is not None]
    small = all(-(2**63) <= number < 2**63 for number in there)
    measured = as_number or (inputs and (exponents or any("." in text for text in known)))
    if any(number != number.to_integral_value() for number in there) or (measured and not small):
        return [None if number is None else float(number) for number in numbers]
    if not small:
        return texts
    return [None if number is None else int(number) for number in numbers]


def _with_column(split: Any, column: str, cells: Sequence[Any], values: Sequence[Any]) -> Any:
    """The split with other values in a column, at its old place; the type is that of the `values` of all splits."""
    import pyarrow
    from datasets import Dataset, Features, Value

    kinds = {int: "int64", float: "float64", bool: "bool", str: "large_string"}
    kind = next((kinds[type(value)] for value in values if value is not None), "float64")
    table = split.data.table
    place = table.column_names.index(column)
    array = pyarrow.array(cells, type=getattr(pyarrow, kind.replace("bool", "bool_"))())
    features = Features({**split.features, column: Value(kind)})
    return Dataset(pyarrow.table(table.set_column(place, column, array)), info=_info(split, features))


def _info(split: Any, features: Any) -> Any:
    info = split.info.copy()
    info.features = features
    return info
