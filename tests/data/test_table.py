"""Tables: numbers brought to one scale, words as one input each, and cells that mean nothing refused by their row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from msfusion.data import DataSpec, load_data
from msfusion.errors import ConfigError, DataError
from msfusion.models import ModelSpec, build_model

datasets = pytest.importorskip("datasets", reason="needs datasets")
pytestmark = [
    pytest.mark.usefixtures("datasets_cache"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

TRAIN = "age,city,member,label\n1,oslo,true,no\n2,rome,false,yes\n3,oslo,false,no\n6,bonn,true,yes\n"
ALL = ("age", "city", "member")


def table(tmp_path: Path, train: str = TRAIN, test: str | None = None, **settings: Any) -> Any:
    folder = tmp_path / "table"
    folder.mkdir(exist_ok=True)
    (folder / "train.csv").write_text(train)
    (folder / "test.csv").write_text(test or TRAIN)
    return load_data(
        DataSpec(str(folder), participants=1, **{"partition": "contiguous", "input_column": ALL, **settings})
    )


def test_by_hand(tmp_path: Path) -> None:
    data = table(tmp_path)
    mean, spread = 3.0, math.sqrt((4 + 1 + 0 + 9) / 4)
    wanted = [
        # age, then bonn, oslo, rome, then member: half of them are
        [(1 - mean) / spread, 0, 1, 0, 1],
        [(2 - mean) / spread, 0, 0, 1, -1],
        [(3 - mean) / spread, 0, 1, 0, -1],
        [(6 - mean) / spread, 1, 0, 0, 1],
    ]
    assert torch.allclose(data.participants[0].inputs[0], torch.tensor(wanted))
    assert data.test.inputs[0].dtype == torch.float32
    assert data.participants[0].targets.tolist() == [0, 1, 0, 1]
    assert data.label_names == ("no", "yes")
    raw = table(tmp_path, normalise=False)
    assert raw.test.inputs[0].tolist()[3] == [6, 1, 0, 0, 1]


def test_numbers_are_inputs_by_themselves(tmp_path: Path) -> None:
    text = "height,weight,label\n1.5,40,0\n2.5,60,1\n"
    data = table(tmp_path, text, text, input_column=None)
    assert data.participants[0].inputs[0].tolist() == [[-1, -1], [1, 1]]
    model = build_model(ModelSpec("mlp", {"hidden": [8]}), data)
    assert model(data.test.inputs[0]).shape == (2, 2)


@pytest.mark.parametrize("unit", ["", "e30", "e160", "e307", "e-160", "e-300"])
def test_numbers_of_any_size_come_to_one_scale(tmp_path: Path, unit: str) -> None:
    """Beside whole numbers with an exponent, too: no 64 bits hold 2e30, and yet it is no name."""
    text = "".join(f"{number}{unit},{number},{number % 2}\n" for number in (1, 2, 3, 6))
    data = table(tmp_path, "mass,same,label\n" + text, "mass,same,label\n" + text, input_column=None)
    wanted = [(number - 3.0) / math.sqrt(3.5) for number in (1, 2, 3, 6)]
    assert data.participants[0].inputs[0].tolist() == [pytest.approx([each, each]) for each in wanted]


@pytest.mark.parametrize(
    ("low", "high"), [("100000000000000000000.0", "300000000000000000000.0"), ("0.0", "5e-324")]
)
def test_numbers_at_the_ends_of_what_there_is(tmp_path: Path, low: str, high: str) -> None:
    """Large ones as programs write them that round to some decimals; and a spread too small to be divided by two."""
    text = f"mass,same,label\n{low},1,0\n{high},3,1\n"
    data = table(tmp_path, text, text, input_column=None)
    column = data.participants[0].inputs[0][:, 0].tolist()
    assert column == ([-1, 1] if low != "0.0" else [0, 1])


def test_a_number_beyond_all_is_refused_by_its_row(tmp_path: Path) -> None:
    text = "mass,same,label\n1e30,1,0\n1e999,2,1\n"
    with pytest.raises(DataError, match=r"example 1 of the training split has inf, .* in the column 'mass'"):
        table(tmp_path, text, text, input_column=None)


def test_a_long_row_of_digits_is_a_name(tmp_path: Path) -> None:
    text = "number,age,label\n12345678901234567890,1,0\n12345678901234567891,2,1\n"
    data = table(tmp_path, text, text, input_column=("number", "age"))
    assert data.participants[0].inputs[0].tolist() == [[1, 0, -1], [0, 1, 1]]


def test_another_split_has_the_scale_of_the_training_split(tmp_path: Path) -> None:
    data = table(tmp_path, test="age,city,member,label\n3,rome,true,no\n")
    assert data.test.inputs[0].tolist() == [[0, 0, 0, 1, 1]]


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("test", "words"),
    [
        ("age,city,member,label\n1,oslo,true,no\n2,nome,true,no\n", "example 1 of the test split has 'nome'"),
        (
            "age,city,member,label\n1,,true,no\n",
            "example 0 of the test split has nothing in the column 'city'",
        ),
        (
            "age,city,member,label\n,oslo,true,no\n",
            "example 0 of the test split has nothing in the column 'age'",
        ),
    ],
)
def test_cells_that_mean_nothing(tmp_path: Path, test: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        table(tmp_path, test=test)


def test_a_column_of_names_is_no_column_of_words(tmp_path: Path) -> None:
    rows = "".join(f"name{row},1,{row % 2}\n" for row in range(101))
    with pytest.raises(DataError, match="'name' has 101 different words, more than 100"):
        table(tmp_path, "name,age,label\n" + rows, "name,age,label\n" + rows, input_column=("name", "age"))


def test_a_cell_that_is_no_number_is_named_where_most_are(tmp_path: Path) -> None:
    rows = [f"{row}.5,1,{row % 2}" for row in range(120)]
    rows[7] = "7.5 kg,1,0"
    text = "\n".join(["mass,age,label", *rows])
    with pytest.raises(
        DataError, match=r"row 8 has '7\.5 kg' in the column 'mass', most of which are numbers"
    ):
        table(tmp_path, text, text, input_column=("mass", "age"))


def test_a_text_among_numbers_could_be_anything(tmp_path: Path) -> None:
    text = "age,weight,city,label\n1,2,oslo,0\n2,2,rome,1\n"
    with pytest.raises(
        DataError, match=r"not clear which columns.*data\.input_column.*'age', 'weight', 'city'"
    ):
        table(tmp_path, text, text, input_column=None)


def test_targets_that_are_measured(tmp_path: Path) -> None:
    text = "height,weight,label\n1.5,40,0.5\n2.5,60,1.25\n"
    with pytest.raises(DataError, match=r"set data\.task"):
        table(tmp_path, text, text, input_column=None)
    data = table(tmp_path, text, text, input_column=None, task="regression")
    assert data.test.targets.tolist() == [[0.5], [1.25]]


def test_the_perceptron_is_for_what_is_no_text() -> None:
    digits = load_data()
    assert build_model(ModelSpec("mlp"), digits)(digits.test.inputs[0][:3]).shape == (3, 10)
    with pytest.raises(ConfigError, match="must be numbers of units"):
        build_model(ModelSpec("mlp", {"hidden": [0]}), digits)
