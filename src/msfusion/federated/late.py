"""Updates that are still under way at the end of a round, beside what participants keep for themselves.

A late participant has its update on its own machine until it has been sent, and with it what it was sent itself: in
the round in which it arrives the global state is another. So both stand among the participants' memories, each as one
tensor with the bytes of a message: checkpoints have them, and a run that resumes merges the update in the round in
which it would have arrived.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cached_property

import torch
from jaxtyping import UInt8
from torch import Tensor

from msfusion.federated.memory import Memories
from msfusion.federated.messages import decode, encoded_update, task_message, task_of, update_of
from msfusion.federated.method import Task, Update
from msfusion.federated.verdict import Norm
from msfusion.width.groups import State

LATE, SENT = ".late", ".sent"
"""The names of those tensors in a memory. No tensor of a model is called so: their names never begin with a dot."""


@dataclass(frozen=True)
class LateUpdate:
    """An update under way, and the task that it answers; its norm, and what is wrong with it (`screening`)."""

    task: Task
    update: Update
    norm: Norm
    fault: str | None = None

    @cached_property
    def messages(self) -> dict[str, Tensor]:
        """The bytes of both, by their names in a memory: the same tensors in each round that it is under way."""
        update = encoded_update(self.update, 0.0, norm=astuple(self.norm), fault=self.fault)
        return {LATE: _as_tensor(update), SENT: _as_tensor(task_message("train", self.task))}


def with_late(memories: Memories, late: Mapping[int, LateUpdate]) -> dict[int, State]:
    """The memories, and each late participant's update in its own."""
    together = dict(memories)
    for participant, each in late.items():
        together[participant] = {**together.get(participant, {}), **each.messages}
    return together


def without_late(memories: Memories) -> tuple[dict[int, State], dict[int, LateUpdate]]:
    """The opposite of `with_late`: the memories that are not empty, and the updates."""
    others: dict[int, State] = {}
    late: dict[int, LateUpdate] = {}
    for participant, memory in memories.items():
        if LATE in memory:
            header, tensors = decode(memory[LATE].numpy().tobytes())
            norm, fault = header.pop("norm"), header.pop("fault")
            update, *_ = update_of(header, tensors)
            task = task_of(*decode(memory[SENT].numpy().tobytes()))
            late[participant] = LateUpdate(task, update, Norm(*norm), fault)
        rest = {name: tensor for name, tensor in memory.items() if name not in (LATE, SENT)}
        if rest:
            others[participant] = rest
    return others, late


def _as_tensor(message: bytes) -> UInt8[Tensor, " bytes"]:
    return torch.frombuffer(bytearray(message), dtype=torch.uint8)
