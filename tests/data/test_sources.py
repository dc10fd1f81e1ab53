"""A source is the folder or file that is meant, as it is now, or a data set of the Hub; never a namesake of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from msfusion.data import DataSpec, load_data
from msfusion.data.hub import open_splits
from msfusion.errors import DataError

datasets = pytest.importorskip("datasets", reason="needs datasets")
pytestmark = [
    pytest.mark.usefixtures("datasets_cache"),
    pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

COMMIT = "0123456789abcdef" * 2 + "01234567"


def table(folder: Path, *numbers: int, name: str = "train.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("size,label\n" + "".join(f"{number},a\n" for number in numbers))
    return folder


def sizes(source: str) -> list[int]:
    return list(open_splits(DataSpec(source))["train"]["size"])


def kept_by_datasets_itself(folder: Path) -> Path:
    """Where another program's use of `datasets` has left what is in a folder."""
    loaded = datasets.load_dataset(str(folder))["train"]
    return Path(loaded.cache_files[0]["filename"]).parent


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, which is empty, beside one with data."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "elsewhere"


def test_a_folder_that_is_not_here_is_not_taken_from_another_place(elsewhere: Path) -> None:
    table(elsewhere / "photos", 1, 2)
    kept_by_datasets_itself(elsewhere / "photos")
    assert list(datasets.load_dataset("photos")["train"]["size"]) == [1, 2]  # what the library does by itself
    with pytest.raises(DataError, match=r"'photos': there is no such folder .*here.*made from other files"):
        load_data(DataSpec("photos"))
    table(Path("photos"), 3)
    assert sizes("photos") == sizes("./photos") == sizes(str(Path("photos").resolve())) == [3]


def test_what_was_read_here_is_not_kept_under_the_name_alone(elsewhere: Path) -> None:
    assert sizes(str(table(elsewhere / "photos", 1, 2))) == [1, 2]
    shutil.rmtree(elsewhere)
    with pytest.raises(DataError, match="'photos': no folder of that name, and from the Hub"):
        load_data(DataSpec("photos"))


def test_a_data_set_that_was_fetched_from_the_hub_is_taken_without_a_network(elsewhere: Path) -> None:
    """`datasets` keeps it under its commit: what is put there in its place is a folder's, by the same library."""
    kept = kept_by_datasets_itself(table(elsewhere / "photos", 4, 5))
    kept.rename(kept.with_name(COMMIT))
    assert sizes("photos") == [4, 5]


@pytest.mark.parametrize("name", ["text", "csv", "imagefolder"])
def test_names_that_are_readers_of_the_library_are_folders_like_others(elsewhere: Path, name: str) -> None:
    table(Path.cwd(), 7)
    with pytest.raises(DataError, match=f"'{name}'"):  # not what lies in the current directory
        load_data(DataSpec(name))
    table(Path(name), 1)
    assert sizes(name) == [1]


@pytest.mark.parametrize(
    "source", ["photos/", "data/photos", "data/a/b", "~/no-photos", "./photos", "../photos", "/photos"]
)
def test_what_is_written_as_a_folder_is_not_looked_for_in_the_hub(elsewhere: Path, source: str) -> None:
    table(Path("data"), 1)
    with pytest.raises(DataError, match=f"'{source}': there is no such folder"):
        load_data(DataSpec(source))


@pytest.mark.parametrize("source", ["prices.csv", "tables/prices.parquet", "notes.TXT"])
def test_what_is_written_as_a_file_is_not_looked_for_in_the_hub(elsewhere: Path, source: str) -> None:
    with pytest.raises(DataError, match=f"'{source}': there is no such file"):
        load_data(DataSpec(source))


@pytest.mark.parametrize("single", [False, True])
def test_what_has_changed_is_read_again_whatever_its_time_says(tmp_path: Path, single: bool) -> None:
    file = table(tmp_path / "table", 1, 2) / "train.csv"
    source = str(file if single else file.parent)
    os.utime(file, (1, 1))
    assert sizes(source) == sizes(source) == [1, 2]
    table(tmp_path / "table", 3, 4)
    os.utime(file, (1, 1))  # as an archive unpacks it whose files all have one time
    assert list(datasets.load_dataset("csv", data_files=str(file))["train"]["size"]) == [3, 4]
    assert sizes(source) == [3, 4]


def test_files_that_come_and_go_are_seen(tmp_path: Path) -> None:
    folder = table(tmp_path / "table", 1, name="train-0.csv")
    assert sizes(str(folder)) == [1]
    table(folder, 2, name="train-1.csv")
    assert sizes(str(folder)) == [1, 2]
    (folder / "train-0.csv").unlink()
    assert sizes(str(folder)) == [2]


def test_what_has_not_changed_is_read_once(tmp_path: Path, datasets_cache: Path) -> None:
    folder = table(tmp_path / "table", 1)
    assert sizes(str(folder)) == [1]
    kept = {path: path.stat().st_mtime_ns for path in datasets_cache.rglob("*.arrow")}
    assert len(kept) == 1
    assert sizes(str(folder)) == [1]
    assert {path: path.stat().st_mtime_ns for path in datasets_cache.rglob("*.arrow")} == kept
