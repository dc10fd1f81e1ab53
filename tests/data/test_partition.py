"""Partitions: what flwr-datasets gives, example by example; and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msfusion.data.partition import PARTITIONS, partition
from msfusion.data.spec import DataSpec
from msfusion.errors import ConfigError, DataError

LABELS = np.random.default_rng(3).integers(0, 7, 500)


@pytest.mark.one_in_ci
@pytest.mark.parametrize("seed", [0, 1, 12345])
@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards"])
def test_our_partition_is_the_one_of_flwr_datasets(name: str, seed: int) -> None:
    pytest.importorskip("flwr_datasets", reason="needs flwr-datasets")
    spec = DataSpec(participants=9, seed=seed, alpha=0.3, min_examples=5, shards=3)
    ours, theirs = partition(name, LABELS, spec), partition(f"flwr:{name}", LABELS, spec)
    assert [part.tolist() for part in ours] == [part.tolist() for part in theirs]


def test_by_column_is_the_one_of_flwr_datasets() -> None:
    pytest.importorskip("flwr_datasets", reason="needs flwr-datasets")
    people = np.array(["cid", "ann", "bob", "ann", "cid", "bob", "ann"])
    spec = DataSpec(participants=3)
    ours, theirs = partition("column", people, spec), partition("flwr:column", people, spec)
    assert (
        [part.tolist() for part in ours] == [part.tolist() for part in theirs] == [[1, 3, 6], [2, 5], [0, 4]]
    )


def test_any_partitioner_of_flwr_datasets_can_be_named_with_its_options() -> None:
    pytest.importorskip("flwr_datasets", reason="needs flwr-datasets")
    spec = DataSpec(participants=7, partition_options={"num_classes_per_partition": 2})
    parts = partition("flwr:pathological", LABELS, spec)
    assert sorted(np.concatenate(parts)) == list(range(500))
    assert all(len(np.unique(LABELS[part])) == 2 for part in parts)


@given(
    name=st.sampled_from(["iid", "dirichlet", "shards", "contiguous"]),
    participants=st.integers(1, 12),
    seed=st.integers(0, 1000),
    alpha=st.floats(0.2, 100),
)
@settings(max_examples=60)
def test_nobody_shares_an_example_and_the_seed_decides(
    name: str, participants: int, seed: int, alpha: float
) -> None:
    spec = DataSpec(participants=participants, seed=seed, alpha=alpha)
    parts = partition(name, LABELS, spec)
    together = np.concatenate(parts)
    assert len(parts) == participants
    assert len(np.unique(together)) == len(together)
    assert name == "shards" or len(together) == len(LABELS)
    assert all(np.array_equal(a, b) for a, b in zip(parts, partition(name, LABELS, spec), strict=True))


def test_a_small_alpha_is_uneven_and_a_large_one_even() -> None:
    def largest_share(alpha: float) -> float:
        parts = partition("dirichlet", LABELS, DataSpec(participants=5, alpha=alpha))
        return float(np.mean([np.bincount(LABELS[part]).max() / len(part) for part in parts]))

    assert largest_share(0.1) > 0.4 > 0.25 > largest_share(1000.0)


def test_shards_leave_few_labels_with_each_participant() -> None:
    parts = partition("shards", LABELS, DataSpec(participants=10, shards=2))
    assert (
        max(len(np.unique(LABELS[part])) for part in parts) <= 4
    )  # two shards, each across one border at most


def test_more_values_than_participants_are_dealt_round() -> None:
    parts = partition("column", np.array(["a", "b", "c", "d", "e"]), DataSpec(participants=2))
    assert [part.tolist() for part in parts] == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize(
    ("name", "keys", "spec", "words"),
    [
        ("iid", LABELS[:4], DataSpec(participants=5), "5 participants cannot share 4 examples"),
        (
            "dirichlet",
            LABELS,
            DataSpec(participants=50, alpha=0.001),
            r"participant \d+ of 50 got 0 .*raise data.alpha",
        ),
        ("dirichlet", LABELS, DataSpec(min_examples=51), "lower data.min_examples"),
        ("iid", LABELS, DataSpec(min_examples=51), "participant 0 of 10 would have 50 examples"),
        ("shards", LABELS, DataSpec(shards=51), "need 510 examples"),
        ("shards", LABELS, DataSpec(shards=8), r"from 7 label\(s\)"),
        ("column", LABELS, DataSpec(participants=8), "7 different values, too few for 8 participants"),
    ],
)
def test_data_that_cannot_be_shared_is_refused(
    name: str, keys: np.ndarray, spec: DataSpec, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        partition(name, keys, spec)


def test_an_unknown_partition_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=", ".join(PARTITIONS)):
        partition("fair", LABELS, DataSpec())


@pytest.mark.parametrize(
    ("name", "spec", "words"),
    [
        ("flwr:fair", DataSpec(), "no such partitioner; there are .*DirichletPartitioner"),
        ("flwr:iid", DataSpec(partition_options={"colour": 1}), "colour, which IidPartitioner does not take"),
        ("flwr:dirichlet", DataSpec(partition_options={"alpha": -1.0}), "strictly greater than zero"),
        (
            "flwr:column",
            DataSpec(participants=3),
            "makes 7 partitions of this data, but participants.count = 3",
        ),
    ],
)
def test_what_flwr_datasets_refuses_is_one_sentence(name: str, spec: DataSpec, words: str) -> None:
    pytest.importorskip("flwr_datasets", reason="needs flwr-datasets")
    with pytest.raises((ConfigError, DataError), match=words):
        partition(name, LABELS, spec)
