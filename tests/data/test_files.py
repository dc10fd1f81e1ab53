"""A single file as data, and files that are programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from msfusion.data import DataSpec, load_data
from msfusion.errors import DataError

datasets = pytest.importorskip("datasets", reason="needs datasets")
pytestmark = pytest.mark.usefixtures("datasets_cache")

ROWS = [{"text": f"word{row}", "label": row % 2} for row in range(20)]


def write(path: Path) -> None:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    elif path.suffix.lower() in (".csv", ".tsv"):
        mark = "," if path.suffix.lower() == ".csv" else "\t"
        path.write_text(
            "\n".join([f"text{mark}label", *(f"{row['text']}{mark}{row['label']}" for row in ROWS)])
        )
    else:
        path.write_text(json.dumps(ROWS) if path.suffix == ".json" else "\n".join(map(json.dumps, ROWS)))


# datasets leaves the csv file to the garbage collector
@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.ndjson", "a.parquet", "A.CSV"])
def test_one_file_of_rows(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    data = load_data(DataSpec(str(tmp_path / name), participants=1, partition="contiguous", length=2))
    assert data.participants[0].targets.bincount().tolist() == [8, 8]
    assert data.test.targets.bincount().tolist() == [2, 2]


def test_a_plain_text_is_running_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a b c\n" * 40)
    data = load_data(DataSpec(str(tmp_path / "a.txt"), participants=1, length=4))
    assert data.task == "language_modelling"
    assert data.participants[0].inputs[0][0].tolist() == [
        data.tokens.index(token) for token in ("a", "b", "c", "\n")
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.xlsx", b"x", "a kind that is not read: .* ending with .txt, .csv"),
        ("README", b"x", "a kind that is not read"),
        ("a.pkl", b"x", "a kind that is not read"),
        ("a.txt", b"", "this file cannot be loaded"),
        ("a.txt", "ä".encode("latin-1"), "this file cannot be loaded .*utf-8"),
        ("a.parquet", b"no parquet", "this file cannot be loaded"),
    ],
)
def test_files_that_are_not_read(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load_data(DataSpec(str(tmp_path / name)))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("source", ["set", "set/set.py"])
def test_a_loading_script_is_never_run(tmp_path: Path, source: str) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.csv")
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match=r"set\.py is a program, which is never run"):
        load_data(DataSpec(str(tmp_path / source)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("column", ["number", "when", "pair"])
def test_an_input_that_no_model_reads_is_refused(tmp_path: Path, column: str) -> None:
    row = {"number": 3, "when": "x", "pair": {"a": "b"}, "label": 0}
    rows = [row, {**row, "label": 1}] * 5
    features = datasets.Features(
        {
            "number": datasets.Value("int64"),
            "when": datasets.Value("string"),
            "pair": {"a": datasets.Value("string")},
            "label": datasets.Value("int64"),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    spec = DataSpec(str(tmp_path / "a.parquet"), input_column=column, participants=1, partition="iid")
    if column == "when":
        assert load_data(spec).vocabulary_size == 5
        return
    if column == "number":  # a table of one column, and the same everywhere
        assert load_data(spec).test.inputs[0].tolist() == [[0.0]] * 2
        return
    with pytest.raises(
        DataError, match=f"the column '{column}' of .* holds .*images, text or lists of numbers"
    ):
        load_data(spec)
