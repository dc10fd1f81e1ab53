"""What `msfusion init` writes down about files: columns, label, task and kind of model."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import msfusion
from PIL import Image

from msfusion.data.suggested import suggested
from msfusion.errors import DataError
from msfusion.experiment.config import load_config

datasets = pytest.importorskip("datasets", reason="needs datasets")
pytestmark = [
    pytest.mark.usefixtures("datasets_cache"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


def csv(path: Path, head: str, *rows: str) -> str:
    path.write_text("\n".join([head, *rows]) + "\n")
    return str(path)


def test_a_table_has_all_its_columns_as_inputs_but_names_of_its_rows(tmp_path: Path) -> None:
    rows = [f"p{each},{20 + each},{'Oslo' if each % 2 else 'Rome'},{each % 3}" for each in range(12)]
    found = suggested(csv(tmp_path / "people.csv", "name,age,city,label", *rows))
    assert found.settings == {"data.input_column": ["age", "city"], "model.name": "mlp"}
    assert found.remarks == ["left out 'name', which has 12 different values"]


def test_the_last_column_is_the_label_where_none_is_called_so(tmp_path: Path) -> None:
    rows = [f"{each % 5},{each / 2},{'yes' if each % 2 else 'no'}" for each in range(12)]
    found = suggested(csv(tmp_path / "table.csv", "a,b,bought", *rows))
    assert found.settings == {
        "data.label_column": "bought",
        "data.input_column": ["a", "b"],
        "model.name": "mlp",
    }
    assert found.remarks == ["no column is named like a label: took the last one, 'bought'"]


def test_amounts_are_a_regression_and_empty_cells_are_told(tmp_path: Path) -> None:
    rows = [f"{each / 2 if each != 4 else ''},{each + 0.5},{each * 1.5}" for each in range(12)]
    found = suggested(csv(tmp_path / "table.csv", "a,b,target", *rows))
    assert found.settings["data.task"] == "regression"
    assert found.remarks[0].startswith("'a' has empty cells")
    whole = [f"{each / 2},{each / 3},{each % 4}" for each in range(12)]
    assert "data.task" not in suggested(csv(tmp_path / "classes.csv", "a,b,target", *whole)).settings


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.csv", "text,label\ngood,1\nbad,0\n", {"model.name": "text_classifier"}),
        (
            "b.csv",
            "words,label\ngood,1\nbad,0\n",
            {"data.input_column": "words", "model.name": "text_classifier"},
        ),
        ("c.txt", "once\nupon\n", {"data.task": "language_modelling", "model.name": "decoder_lm"}),
    ],
)
def test_texts(tmp_path: Path, name: str, text: str, expected: dict[str, object]) -> None:
    (tmp_path / name).write_text(text)
    assert suggested(str(tmp_path / name)).settings == expected


NOTES = [f"the patient number {each} was seen on a {'good' if each % 2 else 'bad'} day" for each in range(12)]


@pytest.mark.parametrize(
    ("head", "cells"),
    [
        ("id,note,topic", "{each},{note},{topic}"),
        ("note,topic", "{note},{topic}"),
        ("topic,note", "{topic},{note}"),
        ("weight,note,topic", "{each}.5,{note},{topic}"),
    ],
)
def test_texts_are_known_by_their_many_words_whatever_the_columns_are_called(
    tmp_path: Path, head: str, cells: str
) -> None:
    rows = [cells.format(each=each, note=note, topic="ab"[each % 2]) for each, note in enumerate(NOTES)]
    found = suggested(csv(tmp_path / "notes.csv", head, *rows))
    assert found.settings == {
        "data.label_column": "topic",
        "data.input_column": "note",
        "model.name": "text_classifier",
    }
    assert "took 'topic', which has few different values" in found.remarks[0]


def test_a_task_that_is_guessed_is_said(tmp_path: Path) -> None:
    found = suggested(
        csv(tmp_path / "notes.csv", "id,note", *(f"{each},{note}" for each, note in enumerate(NOTES)))
    )
    assert found.settings["data.task"] == "language_modelling"
    assert "learn the texts of 'note' themselves" in found.remarks[-1]


def test_columns_that_number_rows_are_no_inputs(tmp_path: Path) -> None:
    rows = [f"{each + 1},{each % 5},{99 - 3 * each},{each % 2}" for each in range(12)]
    found = suggested(csv(tmp_path / "table.csv", "row,size,case_id,label", *rows))
    assert found.settings["data.input_column"] == ["size"]
    assert found.remarks == [
        "left out 'row', which numbers the rows",
        "left out 'case_id', which numbers the rows",
    ]


def test_a_table_without_inputs_is_refused_and_nothing_is_written(here: Path) -> None:
    csv(here / "rows.csv", "row,label", *(f"{each},{each % 2}" for each in range(12)))
    done = msfusion("init", "other.toml", "--data", "rows.csv")
    assert done.exit_code == 2
    assert "no columns for inputs" in done.stderr
    assert not (here / "other.toml").exists()


@pytest.mark.parametrize("name", ["./photos", "prices.csv", "photos/"])
def test_data_that_is_not_there_yet_is_said_to_be_missing(here: Path, name: str) -> None:
    done = msfusion("init", "job.toml", "--data", name)
    assert done.exit_code == 0
    assert f"there is no {name} yet" in done.stderr
    assert load_config(Path("job.toml")).data.source == name
    assert not msfusion("init", "other.toml", "--data", "mine:data").stderr


def test_images_need_nothing_but_folders_of_classes(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "photos" / label / "1.png")
    found = suggested(str(tmp_path / "photos"))
    assert (found.settings, found.remarks) == ({}, ())


def test_what_init_writes_for_a_table_can_be_planned(here: Path) -> None:
    rows = [
        f"{each % 7},{'Oslo' if each % 2 else 'Rome'},{'yes' if each % 3 else 'no'}" for each in range(60)
    ]
    csv(here / "table.csv", "age,city,bought", *rows)
    done = msfusion("init", "job.toml", "--data", "table.csv")
    assert done.exit_code == 0
    assert "took the last one, 'bought'" in done.stderr
    config = load_config(here / "job.toml")
    assert config.data_spec.input_column == ("age", "city")
    assert config.data_spec.label_column == "bought"
    assert config.model.name == "mlp"
    planned = msfusion("plan", "job.toml")
    assert planned.exit_code == 0, planned.output
    assert msfusion("init", "other.toml", "--data", "table.csv", "--model", "mine:net").exit_code == 0
    assert load_config(here / "other.toml").model.name == "mine:net"


def test_what_cannot_be_read_leaves_no_file(here: Path) -> None:
    (here / "broken.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="cannot be loaded"):
        suggested("broken.parquet")
    assert msfusion("init", "job.toml", "--data", "broken.parquet").exit_code == 2
    assert not (here / "job.toml").exists()
