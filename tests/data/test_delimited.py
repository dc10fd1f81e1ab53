"""CSV: words stay words, and labels that differ as text stay different."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from msfusion.data import DataSpec, FederatedData, load_data
from msfusion.errors import DataError

datasets = pytest.importorskip("datasets", reason="needs datasets")

pytestmark = [
    pytest.mark.usefixtures("datasets_cache"),
    pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


def load(path: Path, text: str, **settings: Any) -> FederatedData:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    source = path.parent if path.parent.name == "folder" else path
    return load_data(
        DataSpec(str(source), **{"participants": 1, "partition": "contiguous", "length": 2, **settings})
    )


def texts(data: FederatedData) -> set[str]:
    ids = [*data.participants[0].inputs[0].tolist(), *data.test.inputs[0].tolist()]
    return {data.tokens[row[0]] for row in ids}


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "folder/train.csv"])
@pytest.mark.parametrize("numbers", [False, True], ids=["words", "with a number"])
def test_words_for_missing_numbers_are_texts(tmp_path: Path, name: str, numbers: bool) -> None:
    words = ["NA", "null", "None", "nan", *(["word"] if numbers else [])]
    rows = [(word, label) for label in (0, 1) for word in words for _ in range(2)]
    mark = "\t" if name.endswith("tsv") else ","
    lines = [f"text{mark}label", *(f"{text}{mark}{label}" for text, label in rows)]
    objects = [{"text": text, "label": label} for text, label in rows]
    content = {"jsonl": "\n".join(map(json.dumps, objects)), "json": json.dumps(objects)}
    data = load(tmp_path / name, content.get(name.split(".")[-1], "\n".join(lines)))
    assert texts(data) == {word.lower() for word in words}
    assert data.label_names == ("0", "1")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["3", "12", "3", "12"], ("3", "12")),
        (["NA", "yes", "NA", "yes"], ("NA", "yes")),
        (["12345678901234567", "12345678901234568", "3.0"], ("3", "12345678901234567", "12345678901234568")),
        (["01", "1", "2"], ("01", "1", "2")),
        (["+1", "-1"], ("-1", "1")),
        (["1.0", "2.0", "10.0"], ("1", "2", "10")),
        (["true", "false"], ("False", "True")),
        (["1", "x", "01"], ("01", "1", "x")),
        (
            ["123456789012345678901", "123456789012345678902"],
            ("123456789012345678901", "123456789012345678902"),
        ),
        (["12e3", "12e03", "5"], ("12e03", "12e3", "5")),
        (["1e-400", "2e-400", "0"], ("0", "1e-400", "2e-400")),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["a.csv", "folder/train.csv"])
def test_labels_of_csv_are_told_apart(
    tmp_path: Path, name: str, labels: list[str], names: tuple[str, ...]
) -> None:
    rows = [f"word{index},{label}" for index, label in enumerate(labels * 4)]
    assert load(tmp_path / name, "\n".join(["text,label", *rows])).label_names == names


def test_a_label_has_one_type_in_all_splits(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "test.csv").write_text("text,label\na,1\nb,2\n")
    data = load(tmp_path / "folder" / "train.csv", "text,label\na,1\nb,2\nc,x\n")
    assert data.label_names == ("1", "2", "x")
    assert data.test.targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.csv",
            "text,label\na,0\nb,NA\nc,1\n",
            "example 1 .* has 'NA' in the column 'label', whose other values",
        ),
        ("a.csv", "text,label\na,0\nb,\nc,1\n", "example 1 of the training split has no label"),
        ("a.csv", "text,label\na,x\nb,\nc,y\n", "example 1 of the training split has no label"),
        ("a.csv", "text,label\na,0\nb,0.5\nc,1\n", "example 0.*|a label 0.5"),
        (
            "a.jsonl",
            '{"text": "a", "label": 0}\n{"text": null, "label": 1}\n' * 4,
            "example \\d of the training split .* no text",
        ),
        ("b.jsonl", '{"text": "a"}\n{"text": null}\n' * 4, "example 1 of .* no text"),
        (
            "a.jsonl",
            '{"text": "a", "label": 12345678901234567}\n{"text": "b", "label": 3.5}\n' * 4,
            r"example 0 of the training split has the label 1.2345678901234568e\+16 .* too large",
        ),
    ],
)
def test_what_is_missing_or_merged_is_refused(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load(tmp_path / name, content)


def test_an_empty_cell_is_an_empty_text_and_numbers_are_no_text(tmp_path: Path) -> None:
    rows = [
        f"{number},{text},{index % 2}" for index, (number, text) in enumerate([("1", ""), ("NA", "b")] * 8)
    ]
    data = load(tmp_path / "a.csv", "\n".join(["number,phrase,label", *rows]))
    assert texts(data) == {"\n", "b"}


@pytest.mark.parametrize("users", [("01", "1"), ("0e123", "0e456")])
def test_a_partition_column_is_told_apart_too(tmp_path: Path, users: tuple[str, str]) -> None:
    rows = [f"word{index},{index // 2 % 2},{user}" for index, user in enumerate(users * 10)]
    data = load(
        tmp_path / "a.csv",
        "\n".join(["text,label,user", *rows]),
        participants=2,
        partition="column",
        partition_column="user",
    )
    assert sorted(len(batch) for batch in data.participants) == [7, 9]  # a share of each label is held out
