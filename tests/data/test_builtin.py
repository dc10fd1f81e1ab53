"""The data that is on every machine: digits and Python's documentation."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from msfusion.data import DataSpec, load_data, unigram_perplexity
from msfusion.data.builtin import read_digits, read_python_docs, stratified
from msfusion.errors import DataError


def test_digits_are_those_of_scikit_learn() -> None:
    package = find_spec(
        "sklearn"
    )  # its file is read as it lies there: importing the package takes six seconds
    if package is None or package.origin is None:
        pytest.skip("needs scikit-learn")
    theirs = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    pixels, labels = theirs[:, :-1], theirs[:, -1].astype(int)
    images, ours = read_digits()
    assert torch.equal(images.reshape(-1, 64), torch.from_numpy(pixels / 16.0).float())
    assert np.array_equal(images.reshape(-1, 64).double().numpy() * 16, pixels)
    assert np.array_equal(ours.numpy(), labels)


def test_an_installation_without_the_digits_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    damaged = tmp_path / "digits.safetensors"
    damaged.write_bytes(b"\xff" * 100)
    for path in (tmp_path / "nowhere", damaged):
        monkeypatch.setattr("msfusion.data.builtin._DIGITS", path)
        with pytest.raises(DataError, match="install msfusion again"):
            read_digits()


def test_the_default_is_digits_shared_unevenly_among_ten() -> None:
    data = load_data()
    counts = data.label_counts()
    assert counts is not None
    assert counts.shape == (10, 10)
    assert int(counts.sum()) + len(data.test) == 1797
    assert (data.task, data.classes, data.label_names[3]) == ("classification", 10, "3")
    assert torch.equal(counts.sum(1), data.token_counts())
    shares = counts / counts.sum(1, keepdim=True)
    assert shares.max(1).values.mean() > 0.2  # IID would be 0.1 and a little
    (images,) = data.participants[0].inputs
    assert images.dtype == torch.float32
    assert images.shape[1:] == (1, 8, 8)


def test_training_images_have_mean_zero_and_variance_one() -> None:
    data = load_data(DataSpec(partition="iid"))
    images = torch.cat([batch.inputs[0] for batch in data.participants])
    assert float(images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(images.std()) == pytest.approx(1, abs=1e-3)


def test_the_test_set_is_stratified_and_the_same_under_every_seed() -> None:
    first, second = load_data(DataSpec(seed=1)), load_data(DataSpec(seed=2))
    assert torch.equal(first.test.targets, second.test.targets)
    assert torch.equal(first.test.inputs[0], second.test.inputs[0])
    assert not torch.equal(first.participants[0].targets, second.participants[0].targets)
    counts = first.test.targets.bincount()
    assert counts.min() >= 34
    assert counts.max() <= 37


def test_the_same_seed_gives_the_same_data() -> None:
    first, second = load_data(DataSpec(seed=5)), load_data(DataSpec(seed=5))
    for mine, yours in zip(first.participants, second.participants, strict=True):
        assert torch.equal(mine.inputs[0], yours.inputs[0])
        assert torch.equal(mine.targets, yours.targets)


def test_fewer_examples_on_demand() -> None:
    data = load_data(DataSpec(max_train=100, max_test=7, participants=4, partition="iid"))
    assert [len(batch) for batch in data.participants] == [25] * 4
    assert len(data.test) == 7


def test_stratified_splits_take_a_share_of_each_label() -> None:
    labels = torch.tensor([0] * 10 + [1] * 30)
    train, test = stratified(labels, 0.2, seed=0)
    assert labels[test].bincount().tolist() == [2, 6]
    assert sorted(train.tolist() + test.tolist()) == list(range(40))


def test_python_docs_repeat_no_paragraph() -> None:
    texts = read_python_docs()
    paragraphs = [p.strip() for text in texts.values() for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 1000
    assert sum(map(len, texts.values())) > 250_000
    assert list(texts) == sorted(texts)


def test_python_docs_are_running_text_in_stretches() -> None:
    data = load_data(DataSpec(source="python-docs", participants=4, length=32))
    assert data.task == "language_modelling"
    assert data.classes == data.vocabulary_size < 200
    assert data.label_counts() is None
    (tokens,) = data.participants[0].inputs
    targets = data.participants[0].targets
    assert torch.equal(tokens[:, 1:], targets[:, :-1])  # targets are the next tokens
    assert torch.equal(tokens[1:, 0], targets[:-1, -1])  # and one block goes on where the last one ended
    assert data.participants[0].targets.shape == (len(tokens), 32)
    assert 10 < unigram_perplexity(data) < 60


def test_random_blocks_are_the_same_blocks_in_another_order() -> None:
    stretches = load_data(DataSpec(source="python-docs", participants=3))
    mixed = load_data(DataSpec(source="python-docs", participants=3, partition="iid"))

    def rows(data: object) -> list[list[int]]:
        return sorted(row for batch in data.participants for row in batch.inputs[0].tolist())  # type: ignore[attr-defined]

    assert rows(stretches) == rows(mixed)
    assert not torch.equal(stretches.participants[0].inputs[0], mixed.participants[0].inputs[0])


@pytest.mark.parametrize("partition", ["column", "dirichlet"])
def test_topics_can_be_shared_out(partition: str) -> None:
    spec = DataSpec(source="python-docs", partition=partition, partition_column="topic", participants=5)
    assert len(load_data(spec).participants) == 5


def test_masked_tokens_are_the_targets() -> None:
    data = load_data(DataSpec(source="python-docs", mask_share=0.15, participants=3))
    plain = load_data(DataSpec(source="python-docs", participants=3))
    assert data.masked
    for batch, whole in zip(data.participants, plain.participants, strict=True):
        tokens, targets, unmasked = batch.inputs[0], batch.targets, whole.inputs[0]
        chosen = targets != -100
        assert torch.equal(tokens == 2, chosen)  # the mask's id
        assert torch.equal(torch.where(chosen, targets, tokens), unmasked)
        assert chosen.any(1).all()
        assert 0.12 < chosen.double().mean() < 0.22


def test_unigram_perplexity_of_even_tokens_is_their_number() -> None:
    from msfusion.batch import Batch
    from msfusion.data import FederatedData

    tokens = torch.arange(4).repeat(10, 100)
    data = FederatedData((Batch((tokens,), tokens),), Batch((tokens,), tokens), "language_modelling", 4)
    assert math.isclose(unigram_perplexity(data), 4.0, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (DataSpec(participants=2000), "2000 participants cannot share 1438 examples"),
        (DataSpec(partition_column="user"), "no column 'user' in digits"),
        (DataSpec(source="python-docs", partition_column="user"), "there are topic, text"),
        (DataSpec(source="python-docs", partition="dirichlet"), "goes by labels or a column"),
        (DataSpec(source="python-docs", length=10**6), "do not make one example of data.length"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(spec: DataSpec, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_data(spec)


def test_a_python_without_documentation_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", ModuleType("pydoc_data.topics"))
    with pytest.raises(DataError, match="has no pydoc_data"):
        read_python_docs()
