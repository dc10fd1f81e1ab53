"""Memories beside other tensors: told apart again, whatever the names."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from averaging import Averaging
from averaging import some_data as vectors
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from msfusion.batch import Batch
from msfusion.codecs import Codec, DeadZone
from msfusion.federated.compression import compressed
from msfusion.federated.memory import MARK, with_memories, without_memories
from msfusion.federated.method import Task, Update
from msfusion.federated.work import perform

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


@dataclass(frozen=True)
class Transposing(Averaging):
    """What its participants keep they have made by a transposition, of a task that lies in order."""

    def train(self, task: Task, data: Batch) -> Update:
        assert all(tensor.is_contiguous() for tensor in (*task.tensors.values(), *task.memory.values()))
        return replace(super().train(task, data), memory={"kept": torch.arange(6.0).view(2, 3).t()})


@pytest.mark.parametrize("codec", [None, DeadZone(step=1.0)])
def test_what_is_kept_lies_in_order_whoever_keeps_it(codec: Codec | None) -> None:
    """Sums over equal numbers that lie otherwise have other roundings: a file or a pipe would lay them in order."""
    method = compressed(Transposing(), codec, None)
    memory = {"kept": torch.ones(2, 3).t()}
    task = replace(method.assign(method.initial_state(), 0, 0), memory=memory)
    ((made,), _) = perform(method, "train", [task], vectors(1))
    assert not isinstance(made, Exception)
    kept = made.memory["kept"]
    assert kept.is_contiguous()
    assert kept.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
