"""Data in the Hub's layout: columns found, images and texts as tensors, and everything odd refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msfusion.data import DataSpec, load_data
from msfusion.errors import DataError, MsfusionError

pytestmark = pytest.mark.slow

datasets = pytest.importorskip("datasets", reason="needs datasets")
Image = pytest.importorskip("PIL.Image", reason="needs Pillow")

RAW = {"normalise": False, "partition": "contiguous", "participants": 2}
TEXT, WHOLE = datasets.Value("string"), datasets.Value("int64")
IMAGES = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "eel"])}


def pictures(*pixels: np.ndarray) -> list[Any]:
    return [Image.fromarray(array) for array in pixels]


def random_pixels(count: int, *shape: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8))


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
def test_images_come_back_pixel_by_pixel(write_hub: Callable[..., Path], shape: tuple[int, ...]) -> None:
    pixels = random_pixels(9, *shape)
    train = {"img": pictures(*pixels[:6]), "label": [0, 1, 2, 0, 1, 2]}
    folder = write_hub(IMAGES, train=train, test={"img": pictures(*pixels[6:]), "label": [2, 1, 0]})
    data = load_data(DataSpec(source=str(folder), **RAW))
    wanted = torch.tensor(np.stack(pixels)).float() / 255
    wanted = wanted[:, None] if len(shape) == 2 else wanted.permute(0, 3, 1, 2)
    assert torch.allclose(torch.cat([batch.inputs[0] for batch in data.participants]), wanted[:6])
    assert torch.allclose(data.test.inputs[0], wanted[6:])
    assert data.test.targets.tolist() == [2, 1, 0]
    assert data.label_names == ("cat", "dog", "eel")


def test_shuffled_examples_keep_their_labels_and_test_images_are_normalised_as_training_ones(
    write_hub: Callable[..., Path],
) -> None:
    pixels = [np.full((4, 4), 10 * index, dtype=np.uint8) for index in range(12)]
    rows = {"img": pictures(*pixels), "label": [index % 3 for index in range(12)]}
    folder = write_hub(IMAGES, train=rows, test=rows)
    data = load_data(DataSpec(source=str(folder), participants=3, partition="iid", max_train=8))
    train = torch.cat([batch.inputs[0][:, 0, 0, 0] for batch in data.participants])
    assert len(train) == 8
    assert float(train.mean()) == pytest.approx(0, abs=1e-5)
    whole = load_data(DataSpec(source=str(folder), participants=3, partition="iid"))
    for batch in (*whole.participants, whole.test):
        brightness = (batch.inputs[0][:, 0, 0, 0] * np.std(range(12)) + np.mean(range(12))).round()
        assert torch.equal(brightness.long() % 3, batch.targets)


def test_images_of_many_sizes_are_brought_to_one(write_hub: Callable[..., Path]) -> None:
    rows = {"img": pictures(*random_pixels(3, 6, 5), *random_pixels(1, 9, 9)), "label": [0, 1, 2, 0]}
    folder = write_hub(IMAGES, train=rows, test=rows)
    with pytest.raises(
        DataError, match=r"image 3 of the training split is 9x9 .* first is 5x6.*data.image_size"
    ):
        load_data(DataSpec(source=str(folder), **RAW))
    data = load_data(DataSpec(source=str(folder), image_size=8, **RAW))
    assert data.test.inputs[0].shape == (4, 1, 8, 8)


def test_grey_among_coloured_becomes_coloured_but_never_the_reverse_unasked(
    write_hub: Callable[..., Path],
) -> None:
    grey, coloured = random_pixels(1, 4, 4), random_pixels(1, 4, 4, 3)
    first_coloured = {"img": pictures(*coloured, *grey), "label": [0, 1]}
    first_grey = {"img": pictures(*grey, *coloured), "label": [0, 1]}
    data = load_data(
        DataSpec(source=str(write_hub(IMAGES, train=first_coloured, test=first_coloured)), **RAW)
    )
    assert torch.equal(data.test.inputs[0][1, 0], data.test.inputs[0][1, 2])
    folder = str(write_hub(IMAGES, train=first_grey, test=first_grey))
    with pytest.raises(DataError, match=r"image 1 of the training split is coloured .* data.channels"):
        load_data(DataSpec(source=folder, **RAW))
    assert load_data(DataSpec(source=folder, channels=1, **RAW)).test.inputs[0].shape[1] == 1


def test_without_a_test_split_a_share_of_each_label_is_held_out(write_hub: Callable[..., Path]) -> None:
    rows = {"text": [f"word{i}" for i in range(40)], "label": [0] * 10 + [1] * 30}
    folder = write_hub({"text": TEXT, "label": WHOLE}, train=rows)
    data = load_data(DataSpec(source=str(folder), participants=3))
    assert data.test.targets.bincount().tolist() == [2, 6]
    assert sum(map(len, data.participants)) == 32


def test_texts_to_classify_are_padded_ids_with_labels_by_name(write_hub: Callable[..., Path]) -> None:
    features = {"id": WHOLE, "sentence": TEXT, "target": TEXT}
    train = {"id": [1, 2, 3], "sentence": ["Good good.", "Bad!", ""], "target": ["yes", "no", "no"]}
    test = {"id": [4], "sentence": ["good unheard"], "target": ["yes"]}
    folder = write_hub(features, train=train, validation=test)
    data = load_data(DataSpec(source=str(folder), length=4, participants=1, partition="contiguous"))
    good, end = 4, 3  # the end of a line is the commonest token
    assert data.participants[0].inputs[0].tolist()[0][:2] == [good, good]
    assert data.participants[0].inputs[0].tolist()[2] == [end, 0, 0, 0]
    assert data.test.inputs[0].tolist() == [[good, 1, end, 0]]
    assert data.participants[0].targets.tolist() == [1, 0, 0]
    assert (data.label_names, data.padding, data.vocabulary_size) == (("no", "yes"), 0, 8)


def test_running_text_is_shared_out_by_a_column(write_hub: Callable[..., Path]) -> None:
    rows = {"text": ["a a a a", "b b b b", "a a a a", "b b b b"], "user": ["ann", "bob", "ann", "bob"]}
    folder = write_hub({"text": TEXT, "user": TEXT}, train=rows, test=rows)
    spec = DataSpec(source=str(folder), length=3, participants=2, partition="column", partition_column="user")
    data = load_data(spec)
    assert data.task == "language_modelling"
    tokens = [set(batch.inputs[0].flatten().tolist()) for batch in data.participants]
    assert len(tokens[0] & tokens[1]) == 1  # only the end of a line


def test_labelled_examples_are_shared_out_by_a_column(write_hub: Callable[..., Path]) -> None:
    rows = {"text": list("abcdef"), "label": [0, 1, 0, 1, 0, 1], "site": ["x", "y", "x", "y", "x", "y"]}
    folder = write_hub({"site": TEXT, "text": TEXT, "label": WHOLE}, train=rows, test=rows)
    data = load_data(
        DataSpec(source=str(folder), participants=2, partition="column", partition_column="site")
    )
    assert [batch.targets.tolist() for batch in data.participants] == [[0, 0, 0], [1, 1, 1]]


def test_hidden_test_labels_give_way_to_the_validation_split(write_hub: Callable[..., Path]) -> None:
    features = {"text": TEXT, "label": datasets.ClassLabel(names=["no", "yes"])}
    train = {"text": ["a", "b"], "label": [0, 1]}
    hidden, shown = {"text": ["c"], "label": [-1]}, {"text": ["d", "e", "f"], "label": [1, 1, 0]}
    folder = write_hub(features, train=train, test=hidden, validation=shown)
    assert len(load_data(DataSpec(source=str(folder), participants=2, partition="iid")).test) == 3


def test_lists_of_numbers_are_inputs_too(write_hub: Callable[..., Path]) -> None:
    features = {"x": datasets.Sequence(datasets.Value("float64")), "label": WHOLE}
    rows = {"x": [[0.0, 1.0], [2.0, 3.0]], "label": [0, 1]}
    data = load_data(DataSpec(source=str(write_hub(features, train=rows, test=rows)), **RAW))
    assert data.test.inputs[0].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input_column": "picture"}, "no column 'picture' in .*; there are text, label, number"),
        ({"label_column": "klass"}, "no column 'klass'"),
        ({"partition_column": "user"}, "no column 'user'"),
        ({"input_column": ("number", "size")}, "no column 'size' in .*; there are text, label, number"),
        ({"input_column": ("number", "label")}, "has 'label', which is the label"),
        ({"train_split": "training"}, "no split 'training' to train on; it has train, test"),
        ({"test_split": "dev"}, "no split 'dev' to test on"),
        ({"label_column": "text", "input_column": "text"}, "none of the 4 classes of the training split"),
        ({"participants": 9}, "9 participants cannot share 4 examples"),
    ],
)
def test_settings_that_do_not_fit_the_data(
    write_hub: Callable[..., Path], settings: dict[str, Any], words: str
) -> None:
    features = {"text": TEXT, "label": WHOLE, "number": WHOLE}
    train = {"text": list("abcd"), "label": [0, 1, 0, 1], "number": [1, 2, 3, 4]}
    test = {"text": list("wxyz"), "label": [0, 1, 0, 1], "number": [1, 2, 3, 4]}
    folder = write_hub(features, train=train, test=test)
    with pytest.raises(DataError, match=words):
        load_data(DataSpec(**({"source": str(folder), "participants": 2} | settings)))


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ([0, 1, 1, 1], [0, -1], "example 1 of the test split has label -1, .* none of the 2 classes"),
        ([0, 1, None, 1], [0], "example 2 of the training split has no label"),
        ([0, 1, 0, 1], [0, 0, 7], "example 2 of the test split has label 7"),
        ([], [0], "cannot be loaded .*no data"),
    ],
)
def test_odd_labels_are_named(
    write_hub: Callable[..., Path], train: list[int], test: list[int], words: str
) -> None:
    splits = {
        name: {"text": ["a"] * len(rows), "label": rows}
        for name, rows in {"train": train, "test": test}.items()
    }
    folder = write_hub({"text": TEXT, "label": WHOLE}, **splits)
    with pytest.raises(DataError, match=words):
        load_data(DataSpec(source=str(folder), participants=2))


def test_an_image_that_cannot_be_read_is_named(write_hub: Callable[..., Path]) -> None:
    cells = [{"bytes": b"no image", "path": None}] * 2
    folder = write_hub(IMAGES, train={"img": cells, "label": [0, 1]})
    with pytest.raises(DataError, match=r"image 0 of the training split cannot be read"):
        load_data(DataSpec(source=str(folder), **RAW))


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_missing_folder_is_said_to_be_missing(source: str) -> None:
    with pytest.raises(DataError, match="there is no such folder"):
        load_data(DataSpec(source=source))


def test_an_unreachable_name_is_one_sentence() -> None:
    with pytest.raises(
        MsfusionError, match="no folder of that name, and from the Hub it cannot be loaded"
    ) as caught:
        load_data(DataSpec(source="nobody/nothing"))
    assert "\n" not in str(caught.value)


def test_a_broken_file_is_one_sentence(write_hub: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_hub({"text": TEXT}, train={"text": ["a"]})
    (folder / "train-00000-of-00001.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="this folder cannot be loaded") as caught:
        load_data(DataSpec(source=str(folder)))
    assert "\n" not in str(caught.value)
    shutil.rmtree(folder)


def test_fashion_mnist_is_read_as_it_is(real_data: Callable[[str], Path], write_hub: object) -> None:
    data = load_data(DataSpec(source=str(real_data("fashion_mnist")), max_train=500, max_test=100))
    assert data.classes == 10
    assert data.test.inputs[0].shape == (100, 1, 28, 28)
    assert sum(map(len, data.participants)) == 500


def test_wikitext_has_as_many_tokens_as_published(
    real_data: Callable[[str], Path], write_hub: object
) -> None:
    spec = DataSpec(
        source=str(real_data("wikitext-2")),
        train_split="validation",
        length=1,
        vocabulary_size=10**6,
        participants=2,
    )
    data = load_data(spec)
    tokens = sum(batch.targets.numel() for batch in data.participants)
    assert tokens + 1 == 217_646
    assert data.test.targets.numel() + 1 == 245_569


def test_data_of_ones_own_are_shared_out_evenly_unless_it_is_asked_for(
    write_hub: Callable[..., Path],
) -> None:
    rows = {"x": [[0.0]] * 40, "label": [0, 1] * 20, "user": [0, 1] * 20}
    features = {"x": datasets.Sequence(datasets.Value("float64")), "label": WHOLE, "user": WHOLE}
    source = str(write_hub(features, train=rows, test=rows))

    def sizes(**settings: Any) -> list[int]:
        return [len(each) for each in load_data(DataSpec(source, participants=4, **settings)).participants]

    assert sizes() == [10] * 4
    for asked in ({"partition": "dirichlet"}, {"alpha": 0.1}, {"partition_column": "user"}):
        assert sizes(**asked) != [10] * 4
