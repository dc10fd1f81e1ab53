"""Private memories beside other tensors in one message or one file: told apart by their names.

A memory is what a participant keeps on its own machine between its rounds. Where server and participants are
simulated in one place, it has to pass through that place's pipes and checkpoints; it stays out of the traffic
and out of the aggregate.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from msfusion.width.groups import State

Memories = Mapping[int, State]
"""By participant, what it keeps."""

MARK = ".memory."
"""What the name of a remembered tensor starts with. No tensor of a model is called so: torch refuses modules
and tensors with an empty name, so a model's names never begin with a dot (slashes they may have)."""


def with_memories(tensors: State, memories: Memories) -> dict[str, Tensor]:
    """The tensors, and all memories' tensors as `.memory.<participant>.<name>`. Nothing is copied."""
    remembered = {
        f"{MARK}{participant}.{name}": tensor
        for participant, memory in memories.items()
        for name, tensor in memory.items()
    }
    return {**tensors, **remembered}


def without_memories(tensors: State) -> tuple[dict[str, Tensor], dict[int, dict[str, Tensor]]]:
    """The opposite of `with_memories`: the tensors, and the memories that are not empty."""
    others: dict[str, Tensor] = {}
    memories: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(MARK):
            participant, _, own_name = name.removeprefix(MARK).partition(".")
            memories.setdefault(int(participant), {})[own_name] = tensor
        else:
            others[name] = tensor
    return others, memories
