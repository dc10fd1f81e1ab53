"""Updates that are still under way at the end of a round, beside what participants keep for themselves.

A late participant has its update on its own machine until it has been sent. So it stands among the participants'
memories, as one tensor with the bytes of a message: checkpoints have it, and a run that resumes merges it in the
round in which it would have arrived.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from msfusion.engines.messages import decode, encoded_update, update_of
from msfusion.methods.base import Update
from msfusion.methods.memory import Memories
from msfusion.width.groups import State

LATE = ".late"
"""The name of that tensor in a memory. No tensor of a model is called so: their names never begin with a dot."""


def with_late(memories: Memories, late: Mapping[int, Update]) -> dict[int, State]:
    """The memories, and each late participant's update in its own."""
    together = dict(memories)
    for participant, update in late.items():
        message = torch.frombuffer(bytearray(encoded_update(update, 0.0)), dtype=torch.uint8)
        together[participant] = {**together.get(participant, {}), LATE: message}
    return together


def without_late(memories: Memories) -> tuple[dict[int, State], dict[int, Update]]:
    """The opposite of `with_late`: the memories that are not empty, and the updates."""
    others: dict[int, State] = {}
    late: dict[int, Update] = {}
    for participant, memory in memories.items():
        if LATE in memory:
            late[participant], *_ = update_of(*decode(memory[LATE].numpy().tobytes()))
        rest = {name: tensor for name, tensor in memory.items() if name != LATE}
        if rest:
            others[participant] = rest
    return others, late
