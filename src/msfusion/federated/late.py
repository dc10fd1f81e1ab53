"""Updates that are still under way at the end of a round, beside what participants keep for themselves.

A late participant has its update on its own machine until it has been sent. So it stands among the participants'
memories, as one tensor with the bytes of a message: checkpoints have it, and a run that resumes merges it in the
round in which it would have arrived.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch

from msfusion.federated.memory import Memories
from msfusion.federated.messages import decode, encoded_update, update_of
from msfusion.federated.method import Update
from msfusion.federated.screening import Norm
from msfusion.width.groups import State

LATE = ".late"
"""The name of that tensor in a memory. No tensor of a model is called so: their names never begin with a dot."""


@dataclass(frozen=True)
class LateUpdate:
    """An update under way; its norm, and what is wrong with it by itself, as `screening` has them."""

    update: Update
    norm: Norm
    fault: str | None = None


def with_late(memories: Memories, late: Mapping[int, LateUpdate]) -> dict[int, State]:
    """The memories, and each late participant's update in its own."""
    together = dict(memories)
    for participant, each in late.items():
        encoded = encoded_update(each.update, 0.0, norm=astuple(each.norm), fault=each.fault)
        message = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
        together[participant] = {**together.get(participant, {}), LATE: message}
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
            late[participant] = LateUpdate(update, Norm(*norm), fault)
        rest = {name: tensor for name, tensor in memory.items() if name != LATE}
        if rest:
            others[participant] = rest
    return others, late
