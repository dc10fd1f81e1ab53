"""Participants' own data: encoded by the reference that all of them know, from folders and files as users have them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.data.federated import FederatedData
from msfusion.data.load import load_data
from msfusion.data.loaded import check_batches
from msfusion.data.spec import DataSpec
from msfusion.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets", reason="needs datasets")
PIL = pytest.importorskip("PIL.Image", reason="needs Pillow")


pytestmark = [
    pytest.mark.usefixtures("datasets_cache"),
    pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


def images(folder: Path, **counts: int) -> Path:
    """Grey images in a folder for each class, with pixel values of their own."""
    generator = np.random.default_rng(len(str(folder)) + sum(counts.values()))
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (4, 4), dtype=np.uint8)
            PIL.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def pixels(folder: Path, name: str) -> Tensor:
    files = sorted((folder / name).iterdir())
    return torch.stack([torch.from_numpy(np.array(PIL.open(file))) for file in files]).double() / 255


def sums(values: Tensor) -> list[float]:
    """What tells images apart, whatever their order."""
    return sorted(values.double().flatten(1).sum(1).tolist())


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    images(tmp_path / "reference" / "test", cat=2, dog=2)
    images(tmp_path / "reference" / "train", cat=4, dog=3)
    return tmp_path / "reference"


def test_images_are_normalised_and_numbered_by_the_reference(reference: Path, tmp_path: Path) -> None:
    images(tmp_path / "hospital-0", cat=2, dog=3)
    images(tmp_path / "hospital-1", dog=2)  # of one class only, which is the second all the same
    own = str(tmp_path / "hospital-{participant}")
    data = load_data(DataSpec(str(reference), own=own, participants=2))
    train = torch.cat([pixels(reference / "train", name) for name in ("cat", "dog")])
    for who, labels in enumerate([[0, 0, 1, 1, 1], [1, 1]]):
        batch = data.participants[who]
        assert batch.targets.sort().values.tolist() == labels
        raw = torch.cat(
            [
                pixels(tmp_path / f"hospital-{who}", name)
                for name in ["cat", "dog"][2 - 2 * (who == 0) - who :]
            ]
        )
        expected = (raw - train.mean()) / train.std(correction=0)
        assert sums(batch.inputs[0]) == pytest.approx(sums(expected), abs=1e-4)  # type: ignore[index]
    alone = load_data(DataSpec(str(reference), participants=2, partition="iid"))
    assert torch.equal(data.test.inputs[0], alone.test.inputs[0])  # type: ignore[index]
    assert (data.classes, data.label_names) == (2, ("cat", "dog"))


def texts(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return path


def test_texts_have_the_vocabulary_and_the_labels_of_the_reference(tmp_path: Path) -> None:
    source = texts(tmp_path / "reference.csv", [("good film", "yes"), ("bad film", "no")] * 5)
    first = texts(tmp_path / "a.csv", [("bad bad film", "no")])
    second = texts(tmp_path / "b.csv", [("unheard film", "yes"), ("good", "yes")])
    spec = DataSpec(str(source), own=(str(first), str(second)), participants=2, length=4)
    data = load_data(spec)
    ids = {token: index for index, token in enumerate(data.tokens)}
    assert data.label_names == ("no", "yes")
    assert [batch.targets.tolist() for batch in data.participants] == [[0], [1, 1]]
    assert data.participants[0].inputs[0].tolist() == [[ids["bad"], ids["bad"], ids["film"], ids["\n"]]]  # type: ignore[index]
    rows = sorted(data.participants[1].inputs[0].tolist())  # type: ignore[index]
    assert [1, ids["film"], ids["\n"], 0] in rows  # 1 is an unknown word


def test_running_text_is_cut_into_blocks_of_the_references_words(tmp_path: Path) -> None:
    (tmp_path / "reference.txt").write_text("a b c d\n" * 30)
    (tmp_path / "own-0.txt").write_text("d c b a\nz\n" * 4)
    spec = DataSpec(
        str(tmp_path / "reference.txt"), own=str(tmp_path / "own-{participant}.txt"), participants=1, length=3
    )
    data = load_data(spec)
    (batch,) = data.participants
    said = [[data.tokens[token] for token in row] for row in batch.inputs[0].tolist()[:3]]  # type: ignore[index]
    assert said == [["d", "c", "b"], ["a", "\n", "<unk>"], ["\n", "d", "c"]]
    assert batch.targets[:, :-1].tolist() == batch.inputs[0][:, 1:].tolist()  # type: ignore[index]


def test_words_and_labels_are_words_where_they_look_like_numbers(tmp_path: Path) -> None:
    """As in the reference, though the participant's own file has none that does not."""
    (tmp_path / "reference").mkdir()
    for name in ("train", "test"):
        text = "code,size,label\n" + "2,1.5,7\n2a,0.5,8x\n" * 4
        (tmp_path / "reference" / f"{name}.csv").write_text(text)
    for who in range(2):
        (tmp_path / f"own-{who}").mkdir()
        (tmp_path / f"own-{who}" / "train.csv").write_text("size,label,code\n2,7,2\n")
    spec = DataSpec(
        str(tmp_path / "reference"),
        own=str(tmp_path / "own-{participant}"),
        participants=2,
        input_column=("code", "size"),
        normalise=False,
    )
    for batch in load_data(spec).participants:
        assert isinstance(batch.inputs, tuple)
        assert batch.inputs[0].tolist() == [[1.0, 0.0, 2.0]]
        assert batch.targets.tolist() == [0]


def test_numbers_to_predict(tmp_path: Path) -> None:
    def written(name: str, values: list[float]) -> str:
        rows = {"numbers": [[value, 1.0] for value in values], "label": values}
        datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / f"{name}.parquet"))
        return str(tmp_path / f"{name}.parquet")

    source = written("reference", [float(each) for each in range(10)])
    spec = DataSpec(source, own=(written("own", [7.5, 8.5]),), participants=1, task="regression")
    (batch,) = load_data(spec).participants
    assert sorted(batch.targets.tolist()) == [[7.5], [8.5]]
    assert sorted(batch.inputs[0].tolist()) == [[7.5, 1.0], [8.5, 1.0]]  # type: ignore[index]


def of_participant(participant: int, rows: int = 2) -> Batch:
    return Batch(
        (torch.full((rows + participant, 3), float(participant)),), torch.zeros(rows + participant).long()
    )


def other_shape(participant: int) -> Batch:
    return Batch((torch.zeros(2, 4),), torch.zeros(2).long())


def reference_batches(rows: int = 4, participant: int = 0) -> tuple[Batch, Batch]:
    batch = Batch((torch.rand(rows, 3),), torch.arange(rows) % 2)
    return batch, batch


def test_a_function_is_called_with_the_participants_number() -> None:
    here = "test_own"
    spec = DataSpec(
        f"{here}:reference_batches", own=f"{here}:of_participant", participants=3, options={"rows": 5}
    )
    data = load_data(spec)
    assert [len(batch) for batch in data.participants] == [5, 6, 7]
    assert data.participants[2].inputs[0].unique().tolist() == [2.0]  # type: ignore[index]
    with pytest.raises(DataError, match="must return a Batch"):
        load_data(DataSpec(f"{here}:reference_batches", own=f"{here}:reference_batches", participants=1))


def test_what_is_elsewhere_takes_no_memory(reference: Path) -> None:
    data = load_data(DataSpec(str(reference), own=(100_000, 5), participants=2))
    (inputs,) = data.participants[0].inputs
    assert isinstance(inputs, Tensor)
    assert [len(batch) for batch in data.participants] == [100_000, 5]
    assert inputs.untyped_storage().nbytes() <= 16 * 4 * 4
    assert data.test.repeated(3).targets.tolist() == data.test.targets[:1].tolist() * 3


def test_much_that_is_elsewhere_is_looked_at_in_a_moment() -> None:
    """A hundred million images would take terabytes, and their digest a day."""
    image = Batch((torch.rand(2, 3, 32, 32),), torch.tensor([1, 0]))
    data = FederatedData((image.repeated(10**8), image), image, "classification", 2)
    other = replace(data, participants=(image.repeated(10**8 + 1), image))
    assert len(data.by_holder["participant 0"]) == 1
    check_batches(data.by_holder, 2, None)
    assert data.digests["training"] != other.digests["training"]
    assert data.digests["training"] == replace(data).digests["training"]
    model = TakesPixels()
    assert len(data.for_model(model).participants[0]) == 10**8
    assert image.repeated(1).distinct.targets.tolist() == [1]


class TakesPixels(nn.Module):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return pixel_values


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"own": ("a", "b", "c")}, "data of 3 participants, but participants.count = 2"),
        ({"own": ("nowhere/a/b", 3)}, "data.own of participant 0 = 'nowhere/a/b': there is no such folder"),
        ({"own": ("user/name-on-the-hub", 3)}, "there is no such folder or file"),
        (
            {"own": ("test_own:other_shape", 3), "source": "test_own:reference_batches"},
            "participant 0 are .*, those of the test set",
        ),
        ({"partition": "iid"}, "data.partition shares out"),
        ({"source": "digits", "own": ("a", 3)}, "data.source = 'digits' cannot say how to read"),
        ({"own": ("{odd}", 3)}, "participant 0 has label 'bird', which is none of the 2 classes"),
        ({"own": ("{csv}", 3)}, "participant 0 .* has no column 'image'"),
        ({"own": ("{large}", 3)}, "4x4 pixels and those of participant 0 6x6"),
    ],
)
def test_what_cannot_be_is_refused(
    changed: dict[str, Any], words: str, reference: Path, tmp_path: Path
) -> None:
    images(tmp_path / "odd", bird=1, cat=1)
    (tmp_path / "large" / "cat").mkdir(parents=True)
    PIL.fromarray(np.zeros((6, 6), dtype=np.uint8)).save(tmp_path / "large" / "cat" / "0.png")
    csv = texts(tmp_path / "own.csv", [("good", "yes")])
    named = {"odd": tmp_path / "odd", "csv": csv, "large": tmp_path / "large"}
    settings = {"source": str(reference), "own": (2, 3), "participants": 2, **changed}
    settings["own"] = tuple(
        each.format(**named) if isinstance(each, str) else each for each in settings["own"]
    )
    with pytest.raises((ConfigError, DataError), match=words):
        load_data(DataSpec(**settings))


@pytest.mark.parametrize("own", ["folder", [], [0], [True], [""], [2**62]])
def test_impossible_places_are_refused(own: Any) -> None:
    with pytest.raises((ConfigError, DataError), match=r"data\.own"):
        load_data(DataSpec("digits", own=own if isinstance(own, str) else tuple(own), participants=1))
