"""Labels of any values become classes 0 ... k - 1 and keep their names; a partition goes by values with an order."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from msfusion.batch import Batch
from msfusion.data import DataSpec, load_data
from msfusion.errors import DataError

datasets = pytest.importorskip("datasets", reason="needs datasets")

TEXT, WHOLE, REAL = datasets.Value("string"), datasets.Value("int64"), datasets.Value("float64")
IN_ORDER = {"partition": "contiguous", "participants": 1}
WriteHub = Callable[..., Path]


def labelled(write_hub: WriteHub, feature: Any, train: list[Any], test: list[Any]) -> Path:
    rows = {
        name: {"text": [f"t{row}" for row in range(len(labels))], "label": labels}
        for name, labels in {"train": train, "test": test}.items()
    }
    return write_hub({"text": TEXT, "label": feature}, **rows)


@pytest.mark.parametrize(
    ("feature", "train", "names", "targets"),
    [
        (WHOLE, [1, 2, 3, 1], ("1", "2", "3"), [0, 1, 2, 0]),
        (WHOLE, [7, 3_000_000, 1001, 7], ("7", "1001", "3000000"), [0, 2, 1, 0]),
        (WHOLE, [2**62, 0, -(2**63), 0], (str(-(2**63)), "0", str(2**62)), [2, 1, 0, 1]),
        (WHOLE, [1, -1, -1, 1], ("-1", "1"), [1, 0, 0, 1]),
        (REAL, [2.0, 1.0, 2.0, 1.0], ("1", "2"), [1, 0, 1, 0]),
        (datasets.Value("bool"), [True, False, True, True], ("False", "True"), [1, 0, 1, 1]),
        (TEXT, ["10", "9", "b", "9"], ("10", "9", "b"), [0, 1, 2, 1]),
        (WHOLE, [0, 2, 1, 0], ("0", "1", "2"), [0, 2, 1, 0]),
    ],
)
def test_classes_are_the_different_labels_in_order(
    write_hub: WriteHub, feature: Any, train: list[Any], names: tuple[str, ...], targets: list[int]
) -> None:
    folder = labelled(write_hub, feature, train, train[:2])
    data = load_data(DataSpec(str(folder), **IN_ORDER))
    assert (data.classes, data.label_names) == (len(names), names)
    assert data.participants[0].targets.tolist() == targets
    assert data.test.targets.tolist() == targets[:2]
    numbers = [str(index) for index in range(len(names))]
    told = f"(labels {', '.join(names)} as classes 0 to {len(names) - 1})"
    mapped = feature in (WHOLE, REAL) and list(names) != numbers
    assert (told in data.description) == mapped


@pytest.mark.parametrize(
    ("feature", "train", "test", "words"),
    [
        (
            WHOLE,
            [7, 9, 7, 9],
            [7, 8],
            "example 1 of the test split has label 8, which is none of the 2 classes",
        ),
        (TEXT, ["a", None, "b", "a"], ["a"], "example 1 of the training split has no label"),
        (TEXT, ["a", "b", "b", "a"], ["a", None], "example 1 of the test split has no label"),
        (REAL, [1.0, float("nan"), 0.0, 1.0], [1.0], "example 1 of the training split has no label"),
        (
            REAL,
            [1.0, 0.5, 0.0, 1.0],
            [1.0],
            "example 1 of the training split has a label 0.5 .* integers or text",
        ),
        (REAL, [1.0, float("inf"), 0.0, 1.0], [1.0], "a label inf"),
        (datasets.List(WHOLE), [[0], [1], [0], [1]], [[0]], "a label of type list"),
        ({"id": WHOLE}, [{"id": 0}] * 4, [{"id": 0}], "a label of type dict"),
        (datasets.Value("binary"), [b"a", b"b"] * 2, [b"a"], "a label of type bytes"),
        (WHOLE, list(range(200)), [0], "all 200 examples have different labels .* data.label_column"),
        (
            datasets.ClassLabel(names=["a", "b"]),
            [0, 1, -1, 0],
            [0],
            "example 2 of the training split has label -1",
        ),
    ],
)
def test_what_is_no_class_is_named(
    write_hub: WriteHub, feature: Any, train: list[Any], test: list[Any], words: str
) -> None:
    folder = labelled(write_hub, feature, train, test)
    with pytest.raises(DataError, match=words):
        load_data(DataSpec(str(folder), input_column="text", label_column="label", **IN_ORDER))


@pytest.mark.parametrize("others", [["dog", "cat"], ["dog", "bird", "cat"]])
def test_a_split_that_numbers_the_classes_otherwise_is_read_by_their_names(
    others: list[str], tmp_path: Path
) -> None:
    rows = {"text": ["a", "b"], "label": [0, 1]}
    splits = {
        split: datasets.Dataset.from_dict(
            rows, features=datasets.Features({"text": TEXT, "label": datasets.ClassLabel(names=names)})
        )
        for split, names in {"train": ["cat", "dog"], "test": others}.items()
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    if "bird" in others:
        with pytest.raises(DataError, match="example 1 of the test split has label 'bird', which is none of"):
            load_data(DataSpec(str(tmp_path / "saved"), **IN_ORDER))
    else:
        assert load_data(DataSpec(str(tmp_path / "saved"), **IN_ORDER)).test.targets.tolist() == [1, 0]


def test_minus_one_may_be_a_class_and_hidden_labels_are_still_hidden(write_hub: WriteHub) -> None:
    folder = labelled(write_hub, WHOLE, [0, 1] * 5, [-1, -1])
    assert len(load_data(DataSpec(str(folder), **IN_ORDER)).participants[0]) == 8  # a share is held out
    folder = labelled(write_hub, WHOLE, [-1, 1] * 5, [-1, -1])
    assert load_data(DataSpec(str(folder), **IN_ORDER)).test.targets.tolist() == [0, 0]


@pytest.mark.parametrize("largest", [2**62, 2**24])
def test_a_function_with_huge_labels_is_refused(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    batch = Batch((torch.rand(4, 3),), torch.tensor([0, 1, 2, largest]))
    monkeypatch.setattr("msfusion.data.function.import_function", lambda *_: lambda: (batch, batch))
    with pytest.raises(DataError, match=f"labels up to {largest} .* number them 0 to k - 1"):
        load_data(DataSpec("some:function", participants=2))


NAN = float("nan")
DAY = datetime.datetime(2020, 1, 1)


@pytest.mark.parametrize(
    ("feature", "values", "words"),
    [
        (
            TEXT,
            ["a", "b", None, "a"],
            "example 2 of the training split has no value in the partition column 'user'",
        ),
        (WHOLE, [1, None, 2, 1], "example 1 of the training split has no value"),
        (REAL, [1.0, 2.0, 2.0, NAN], "example 3 of the training split has no value"),
        (datasets.List(WHOLE), [[1], [2], [1], [2]], "example 0 of the training split has a list"),
        (datasets.List(WHOLE), [None, [2], [1], [2]], "example 0 of the training split has no value"),
        ({"id": WHOLE}, [{"id": 1}, {"id": 2}] * 2, "has a dict in the partition column 'user'"),
    ],
)
@pytest.mark.parametrize("partition", ["column", "dirichlet", "shards", "flwr:natural_id"])
def test_a_row_without_a_value_to_share_out_by_is_named(
    write_hub: WriteHub, feature: Any, values: list[Any], words: str, partition: str
) -> None:
    rows = {"text": list("abcd"), "label": [0, 1, 0, 1], "user": values}
    folder = write_hub({"text": TEXT, "label": WHOLE, "user": feature}, train=rows)
    with pytest.raises(DataError, match=words):
        load_data(DataSpec(str(folder), participants=2, partition=partition, partition_column="user"))


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("feature", "first", "second"),
    [
        (TEXT, "b", "a"),
        (TEXT, "a\0", "a"),
        (datasets.Value("binary"), b"a\0", b"a"),
        (REAL, 2.5, -1.0),
        (datasets.Value("bool"), True, False),
        (datasets.Value("timestamp[us]"), DAY + datetime.timedelta(1), DAY),
    ],
)
@pytest.mark.parametrize("partition", ["column", "flwr:natural_id"])
def test_any_values_with_an_order_share_out(
    write_hub: WriteHub, feature: Any, first: Any, second: Any, partition: str
) -> None:
    if partition.startswith("flwr:"):
        pytest.importorskip("flwr_datasets", reason="needs flwr-datasets")
    rows = {"text": list("abcdef"), "label": [0, 1, 1, 0, 0, 0], "user": [first, second, second] * 2}
    folder = write_hub({"text": TEXT, "label": WHOLE, "user": feature}, train=rows, test=rows)
    data = load_data(DataSpec(str(folder), participants=2, partition=partition, partition_column="user"))
    assert [sorted(batch.targets.tolist()) for batch in data.participants] == [[0, 0, 1, 1], [0, 0]]


def test_values_of_several_kinds_are_refused(tmp_path: Path) -> None:
    lines = ['{"text": "a", "label": 0, "user": 1}', '{"text": "b", "label": 1, "user": "x"}'] * 2
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    spec = DataSpec(str(tmp_path / "rows.jsonl"), participants=2, partition="column", partition_column="user")
    with pytest.raises(
        DataError, match="partition column 'user' are of several kinds: int in example 0 and str in"
    ):
        load_data(spec)
