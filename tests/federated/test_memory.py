"""Memories beside other tensors: told apart again, whatever the names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from msfusion.federated.memory import MARK, with_memories, without_memories

NAMES = st.text(max_size=12).filter(lambda name: not name.startswith("."))


@given(st.sets(NAMES), st.dictionaries(st.integers(0, 99), st.sets(st.text(max_size=12), min_size=1)))
def test_they_come_apart_as_they_were(names: set[str], remembered: dict[int, set[str]]) -> None:
    tensors = {name: torch.tensor(1.0) for name in names}
    memories = {
        participant: {name: torch.tensor(2) for name in own} for participant, own in remembered.items()
    }
    assert without_memories(with_memories(tensors, memories)) == (tensors, memories)


def test_no_tensor_of_a_model_is_called_so() -> None:
    module = nn.Module()
    module.register_buffer("a/b", torch.zeros(1))  # a slash would have been no safe mark
    assert MARK.startswith(".")
    with pytest.raises(KeyError, match="empty string"):
        module.register_buffer("", torch.zeros(1))
    with pytest.raises(KeyError, match="empty string"):
        module.add_module("", nn.Module())
