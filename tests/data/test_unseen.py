"""Examples for a trained model: read as the training data was, whatever a file holds by itself, or refused."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msfusion.data.inputs import TextEncoding
from msfusion.data.labels import Classes
from msfusion.data.preprocessing import Preprocessing
from msfusion.data.table import NumberColumn, TableEncoding, WordColumn
from msfusion.data.text import Encoder
from msfusion.data.unseen import load_unseen
from msfusion.errors import DataError

datasets = pytest.importorskip("datasets", reason="needs datasets")
pytestmark = [
    pytest.mark.usefixtures("datasets_cache"),
    pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

TABLE = Preprocessing(
    "classification",
    TableEncoding((NumberColumn("age", 10.0, 2.0), WordColumn("code", ("1a", "2", "true")))),
    3,
    Classes("label", ("1", "2", "3b"), ("1", "2", "3b")),
)
WORDS = Encoder.of_vocabulary("words", ("<pad>", "<unk>", "<mask>", "42", "true", "\n"))
TEXT = Preprocessing(
    "classification", TextEncoding("text", WORDS, 2), 2, Classes("label", ("0", "1"), (0, 1))
)


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "new.csv").write_text(text, encoding="utf-8")
    return tmp_path / "new.csv"


def test_a_file_in_which_words_look_like_numbers(tmp_path: Path) -> None:
    """By itself it would have whole numbers in the columns `code` and `label`, of which training knew words."""
    found = load_unseen(written(tmp_path, "label,code,age\n2,2,12\n1,2,8\n"), TABLE)
    assert found.inputs.tolist() == [[1.0, 0.0, 1.0, 0.0], [-1.0, 0.0, 1.0, 0.0]]
    assert found.targets is not None
    assert found.targets.tolist() == [1, 0]
    found = load_unseen(written(tmp_path, "code,age\ntrue,12\n"), TABLE)
    assert found.inputs.tolist() == [[1.0, 0.0, 0.0, 1.0]]


@pytest.mark.parametrize(("text", "ids"), [("42", [3, 5]), ("true", [4, 5]), ("1e3", [1, 5]), ('""', [5, 0])])
def test_a_text_that_looks_like_a_number(tmp_path: Path, text: str, ids: list[int]) -> None:
    found = load_unseen(written(tmp_path, f"text,label\n{text},1\n"), TEXT)
    assert found.inputs.tolist() == [ids]


def test_a_number_that_looks_like_a_name(tmp_path: Path) -> None:
    """Whole numbers of more than 64 bits are names in a column of which nothing is known."""
    found = load_unseen(written(tmp_path, "code,age\n2,1e20\n"), TABLE)
    assert found.inputs[0, 0] == torch.tensor(5e19)


@pytest.mark.parametrize("end", [",7\n", ",\n"])
def test_rows_with_more_cells_than_the_header_are_refused(tmp_path: Path, end: str) -> None:
    """pandas would take each cell for that of the column to its left."""
    with pytest.raises(DataError, match="more cells than its header"):
        load_unseen(written(tmp_path, f"age,code{end[0]}label\n12,2,1{end}12,2,1{end}"), TABLE)


def test_a_byte_order_mark_and_another_order_of_columns(tmp_path: Path) -> None:
    found = load_unseen(written(tmp_path, '\ufeff"code","more","age"\n"1a",x,12\n'), TABLE)
    assert found.inputs.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert found.targets is None


@pytest.mark.parametrize(
    "age", [datetime.date(2020, 1, 1), datetime.timedelta(3), {"a": 1}, [30], b"30", "30"]
)
def test_what_is_no_number_is_refused(age: Any) -> None:
    with pytest.raises(DataError, match=r"example 0 of these examples has .* must be a number"):
        load_unseen([{"age": age, "code": "2"}], TABLE)


@pytest.mark.parametrize("code", [["2"], 2, b"2", {"2": 1}])
def test_what_is_no_word_is_refused(code: Any) -> None:
    with pytest.raises(DataError, match="in the column 'code', which the training split does not have"):
        load_unseen([{"age": 30, "code": code}], TABLE)


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(DataError, match="of the type int in the column 'text'"):
        load_unseen([5], TEXT)


@pytest.mark.parametrize("examples", [b"42", {"text": "42"}, "frame"], ids=["bytes", "a dict", "frame"])
def test_what_is_no_list_of_examples_is_refused(examples: Any) -> None:
    """The keys of a dict, or the columns of a table of pandas, would be taken for texts."""
    import pandas

    given = pandas.DataFrame({"text": ["42"]}) if examples == "frame" else examples
    with pytest.raises(DataError, match="these examples are of the type"):
        load_unseen(given, TEXT)


def test_arrays_and_other_sequences_are_lists_of_examples() -> None:
    assert load_unseen(np.array(["42", "true"]), TEXT).inputs.tolist() == [[3, 5], [4, 5]]
    assert load_unseen(("42",), TEXT).inputs.tolist() == [[3, 5]]
    with pytest.raises(DataError, match="the list is empty"):
        load_unseen([], TEXT)
