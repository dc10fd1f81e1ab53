"""What the ranks have, through the first of them to a file and back: one tensor at a time.

The file is that of a run in one process: whole tensors of the state, and what every participant keeps for itself,
updates that are under way among it. All ranks call everything here at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from msfusion.engines.sharded.parcels import (
    collected,
    dtype_named,
    joined,
    parted,
    put_together,
    scattered,
)
from msfusion.engines.sharded.ranks import Ranks
from msfusion.errors import RunDirectoryError
from msfusion.federated.late import LATE, SENT, LateUpdate, with_late, without_late
from msfusion.federated.memory import Memories, with_memories, without_memories
from msfusion.federated.sharding import Form, Shard
from msfusion.width.groups import State

ELSEWHERE = ".elsewhere"
"""In the memory of a participant that another rank carries: that there is one. No tensor of a model is called so."""

UNDER_WAY = (LATE, SENT)


def receipt() -> dict[str, Tensor]:
    """What a rank has of the memory of a participant that another one carries."""
    return {ELSEWHERE: torch.zeros(())}


@dataclass(frozen=True, eq=False)
class Kept:
    """Tensors of the state and of memories, by the names of a file: `read` gives a whole one at the first rank.

    They are read in the order of their names, each once. `forms` is right at the first rank; others have the names.
    """

    forms: Mapping[str, Form]
    read: Callable[[str], Tensor]


class Keeping:
    """Between a file and the ranks. `carrier_of` says which rank carries a participant."""

    def __init__(self, ranks: Ranks, shard: Shard, carrier_of: Callable[[int], int]) -> None:
        self._ranks, self._shard, self._carrier_of = ranks, shard, carrier_of

    def kept(self, state: State, memories: Memories) -> Kept:
        """What a checkpoint of this state has in it."""
        own = {who: _private(memory) for who, memory in memories.items() if self._is_here(who)}
        here = with_memories({}, own)
        told = self._ranks.tell([[name, str(each.dtype), list(each.shape)] for name, each in here.items()])
        carried = {
            name: (Form(dtype_named(dtype), tuple(shape)), rank)
            for rank, each in enumerate(told)
            for name, dtype, shape in each
        }
        late = {
            name: (who, kind)
            for who, memory in memories.items()
            for kind in UNDER_WAY
            if kind in memory
            for name in with_memories({}, {who: {kind: memory[kind]}})
        }

        def message(name: str) -> Tensor:
            who, kind = late[name]
            whole = self._whole_late(who, memories[who])
            return torch.empty(0, dtype=torch.uint8) if whole is None else whole[kind]

        def read(name: str) -> Tensor:
            if name in late:
                return message(name)
            if name in carried:
                form, rank = carried[name]
                return self._brought(name, form, rank, here)
            return collected(self._ranks, self._shard, state, [name]).get(name, state[name])

        # in the order of the first state, which one that was read from a file has not
        forms = {name: form for name, form in self._shard.forms.items() if name in state}
        forms |= {name: form for name, (form, _) in carried.items()}
        forms |= {name: Form(torch.uint8, tuple(message(name).shape)) for name in sorted(late)}
        return Kept(forms, read)

    def hand_over(self, kept: Kept) -> None:
        """On other ranks than the first, while that writes a file."""
        for name in sorted(kept.forms):
            kept.read(name)

    def taken(
        self, forms: Mapping[str, Form], read: Callable[[str], Tensor]
    ) -> tuple[dict[str, Tensor], dict[int, State]]:
        """What this rank has of what a file keeps: its rows of the state, the memories of those whom it carries, and
        its parts of updates under way. `read` gives a whole tensor at the first rank.
        """
        state: dict[str, Tensor] = {}
        memories: dict[int, dict[str, Tensor]] = {}
        under_way: dict[int, dict[str, Tensor]] = {}
        for name in sorted(forms):
            _, one = without_memories({name: torch.empty(0)})
            if not one:
                if name not in self._shard.forms:
                    raise RunDirectoryError(f"a checkpoint has a tensor {name!r} that the run has not")
                state[name] = scattered(self._ranks, self._shard, name, forms[name], partial(read, name))
                continue
            ((who, (own_name,)),) = one.items()
            readers = range(self._ranks.count) if own_name in UNDER_WAY else [self._carrier_of(who)]
            tensor = self._given(name, forms[name], read, readers)
            if own_name in UNDER_WAY:
                under_way.setdefault(who, {})[own_name] = tensor
                if len(under_way[who]) == len(UNDER_WAY):
                    part = self._part_of_late(who, under_way.pop(who))
                    memories[who] = {**memories.get(who, {}), **part}
            elif self._is_here(who):
                memories.setdefault(who, {})[own_name] = tensor
            else:
                memories.setdefault(who, {}).update(receipt())
        return state, dict(memories)

    def _is_here(self, who: int) -> bool:
        return self._carrier_of(who) == self._ranks.rank

    def _brought(self, name: str, form: Form, rank: int, here: State) -> Tensor:
        """A tensor that one rank has, at the first."""
        if rank == 0:
            self._ranks.exchange({}, {})
            return here.get(name, torch.empty(0))
        outgoing = {0: joined({name: here[name]})} if self._ranks.rank == rank else {}
        received = self._ranks.exchange(outgoing, {rank: form.nbytes} if self._ranks.is_first else {})
        return parted(received[rank], {name: form})[name] if self._ranks.is_first else torch.empty(0)

    def _given(self, name: str, form: Form, read: Callable[[str], Tensor], readers: Sequence[int]) -> Tensor:
        """A whole tensor that the first rank reads, at some ranks; empty at others."""
        own = read(name) if self._ranks.is_first else None
        others = [rank for rank in readers if rank != 0]
        outgoing = {} if own is None else dict.fromkeys(others, joined({name: own}))
        received = self._ranks.exchange(outgoing, {0: form.nbytes} if self._ranks.rank in others else {})
        if received:
            return parted(received[0], {name: form})[name].clone()
        return torch.empty(0) if own is None else own

    def _whole_late(self, who: int, memory: State) -> State | None:
        """The messages of an update that is under way, whole, at the first rank; None at others."""
        late = without_late({who: memory})[1][who]
        task, update = late.task, late.update
        tensors = [
            put_together(
                self._ranks, self._shard.places([*each.tensors], each.round_index, who), each.tensors, 0
            )
            for each in (task, update)
        ]
        if tensors[0] is None or tensors[1] is None:
            return None
        whole = replace(
            late, task=replace(task, tensors=tensors[0]), update=replace(update, tensors=tensors[1])
        )
        return with_late({}, {who: whole})[who]

    def _part_of_late(self, who: int, messages: State) -> State:
        """The messages with the rows that are this rank's."""
        late = without_late({who: messages})[1][who]
        task, update = late.task, late.update
        places = self._shard.places([*task.tensors], task.round_index, who)

        def rows(tensors: State) -> dict[str, Tensor]:
            return {
                name: places[name].take(tensor, self._ranks.rank) if name in places else tensor
                for name, tensor in tensors.items()
            }

        part = LateUpdate(
            replace(task, tensors=rows(task.tensors)),
            replace(update, tensors=rows(update.tensors)),
            late.norm,
            late.fault,
        )
        return with_late({}, {who: part})[who]


def _private(memory: State) -> State:
    """What a participant itself keeps, without an update that is under way."""
    return {name: tensor for name, tensor in memory.items() if name not in UNDER_WAY}
