"""The largest of many logits, and what stands for the others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msfusion.batch import Batch
from msfusion.objectives import cross_entropy
from msfusion.offsets import LargestLogits, bytes_of_largest, full, largest_within


def test_two_targets_and_three_classes_by_hand() -> None:
    """common = [1, 2, 3] in the mean; of each target one logit is kept."""
    logits = torch.tensor([[2.0, 1.0, 5.0], [0.0, 3.0, 1.0]])
    found = LargestLogits.of([logits], 1)
    assert torch.equal(found.common, torch.tensor([1.0, 2.0, 3.0]))
    assert found.classes.tolist() == [[2], [1]]
    others = [
        math.log(math.exp(2) + math.exp(1)) - math.log(math.exp(1) + math.exp(2)),
        math.log(math.exp(0) + math.exp(1)) - math.log(math.exp(1) + math.exp(3)),
    ]
    expected = torch.tensor(
        [[1 + others[0], 2 + others[0], 5.0], [1 + others[1], 3.0, 3 + others[1]]], dtype=torch.float32
    )
    assert torch.allclose(found.full(), expected, atol=1e-6)


shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(2, 40))


@given(shapes, st.integers(0, 1000), st.data())
def test_kept_classes_have_their_probability_and_the_others_together_theirs(
    shape: tuple[int, int, int], seed: int, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    kept = data.draw(st.integers(1, shape[-1]))
    found = LargestLogits.of(logits.split(2), kept)
    chosen = found.classes.long()
    exact, ours = logits.softmax(-1), found.full().softmax(-1)
    assert torch.allclose(ours.gather(-1, chosen), exact.gather(-1, chosen), atol=1e-12)
    assert torch.equal(chosen.sort(-1).values, logits.topk(kept, -1).indices.sort(-1).values)
    if kept == shape[-1]:
        assert torch.allclose(found.full(), logits, atol=1e-12)


def test_parts_make_no_difference_and_an_index_is_the_tensors() -> None:
    logits = torch.randn(9, 4, 30, dtype=torch.float64)
    whole, parts = LargestLogits.of([logits], 7), LargestLogits.of(logits.split(4), 7)
    assert torch.allclose(whole.full(), parts.full(), atol=1e-12)
    for index in (slice(2, 5), torch.tensor([8, 0, 3])):
        assert torch.equal(whole[index].full(), whole.full()[index])
    other = LargestLogits.of([torch.randn(9, 4, 30, dtype=torch.float64)], 7)
    together = LargestLogits.added([whole, other])
    assert torch.allclose(together.full(), whole.full() + other.full(), atol=1e-12)
    assert torch.equal(LargestLogits.from_tensors(whole.tensors()).full(), whole.full())


def test_what_matters_is_for_the_sum_to_say() -> None:
    """A correction that makes the likeliest class unlikely is kept, though its own logit is the smallest."""
    first = torch.zeros(3, 10, dtype=torch.float64)
    first[:, 2] = 9.0
    correction = torch.linspace(0, 1, 10, dtype=torch.float64).repeat(3, 1)
    correction[1, 2] = -5.0
    beside = LargestLogits.of([first], 2)
    found = LargestLogits.of(correction.split(2), 2, beside)
    assert 2 in found.classes[1]
    whole = LargestLogits.added([beside, found]).full().softmax(-1)
    exact = (first + correction).softmax(-1)
    chosen = found.classes.long()
    assert torch.allclose(whole.gather(-1, chosen), exact.gather(-1, chosen), atol=1e-12)


def test_classes_that_are_impossible_stay_so() -> None:
    logits = torch.randn(6, 12)
    logits[:3, 4] = -torch.inf
    found = LargestLogits.of([logits], 5).full().softmax(-1)
    assert bool(torch.isfinite(found).all())
    assert (
        float(found[:3, 4].max()) < 0.02
    )  # not kept: in the mean of all targets it is hardly possible either
    assert torch.allclose(LargestLogits.of([logits], 12).full().softmax(-1), logits.softmax(-1), atol=1e-5)


def test_a_batch_scores_with_it_as_with_the_tensor_it_stands_for() -> None:
    model = torch.nn.Linear(3, 20)
    inputs, targets = (torch.randn(8, 3),), torch.randint(20, (8,))
    said = LargestLogits.of([torch.randn(8, 20)], 6)
    ours, dense = Batch(inputs, targets, said), Batch(inputs, targets, full(said))
    chosen = torch.tensor([5, 1, 2])
    assert cross_entropy(model, ours.take(chosen)) == cross_entropy(model, dense.take(chosen))
    assert cross_entropy(model, ours.to(torch.device("cpu"))) == cross_entropy(model, dense)


@pytest.mark.parametrize("itemsize", [4, 8])
def test_as_many_as_there_is_room_for(itemsize: int) -> None:
    for limit in range(0, 40_000, 1237):
        kept = largest_within(limit, 10, 300, itemsize)
        if kept:
            assert bytes_of_largest(10, 300, kept, itemsize) <= limit
        assert kept == 300 or bytes_of_largest(10, 300, kept + 1, itemsize) > limit
    dtype = {4: torch.float32, 8: torch.float64}[itemsize]
    found = LargestLogits.of([torch.randn(10, 300, dtype=dtype)], 17)
    assert sum(tensor.nbytes for tensor in found.tensors().values()) == bytes_of_largest(
        10, 300, 17, itemsize
    )
