"""What travels between the server and its workers comes back as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msfusion.errors import PrivacyError
from msfusion.federated.messages import (
    decode,
    encode,
    encoded_update,
    task_message,
    update_message,
    update_of,
)
from msfusion.federated.method import Released, Task, Update
from msfusion.federated.privacy import Outbound
from msfusion.width.groups import State

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8)


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(), st.none()), max_size=3),
)
def test_messages_come_back_as_they_were(outlines: dict, header: dict) -> None:
    tensors = {name: torch.randint(2, shape).to(dtype) for name, (dtype, shape) in outlines.items()}
    again, arrived = decode(encode(header, tensors))
    assert again == header
    assert list(arrived) == list(tensors)
    for name, tensor in tensors.items():
        assert arrived[name].dtype == tensor.dtype
        assert torch.equal(arrived[name], tensor)


def test_views_are_sent_as_what_they_show() -> None:
    full = torch.arange(12.0).reshape(3, 4)
    _, arrived = decode(encode({}, {"transposed": full.T, "column": full[:, 1]}))
    assert torch.equal(arrived["transposed"], full.T)
    assert torch.equal(arrived["column"], full[:, 1])


def test_a_memory_is_in_no_message() -> None:
    tensors, memory = {"weight": torch.ones(3)}, {"weight": torch.zeros(2), ".round": torch.tensor(4)}
    header, arrived = decode(task_message("train", Task(12, 5, tensors, memory=memory)))
    assert header["remembers"]
    assert_same(arrived, tensors)
    update = Update(12, 5, tensors, 7, 0.5, memory=memory)
    again, seconds, remembers = update_of(*decode(encoded_update(update, 1.5)))
    assert (again.participant, again.examples, seconds, remembers) == (12, 7, 1.5, True)
    assert_same(again.tensors, tensors)
    assert not again.memory


def test_only_what_a_declaration_has_let_pass_becomes_a_message() -> None:
    tensors = {"weight": torch.ones(3)}
    update = Update(12, 5, tensors, 7, 0.5)
    with pytest.raises(PrivacyError, match="participant 12 would send what no declaration has let pass"):
        update_message(Released(update), 0.0)
    shared = Outbound.like(tensors).select(tensors, {}, "participant 12")
    again, *_ = update_of(*decode(update_message(Released(replace(update, tensors=shared)), 0.0)))
    assert_same(again.tensors, tensors)


def assert_same(left: State, right: State) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
