"""How a method's state is divided among ranks, each of which holds a part of it, and none all.

    rank r holds of every tensor of the state the rows that it owns                        its shard
    assign, on shard r      the rows that r owns of what a participant receives            a part of its task
    fuse, on shard r        the next shard, from the parts of all updates that r owns      the same sums, entry by entry

A method says how (`Method.sharding`): by which map its tensors are divided, which units of it a task has, and what the
method is on a shard. Tensors whose names begin with a dot are the method's own notes, and small: every rank has them,
and works them out alike. So are tensors without an axis, such as counters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.objectives import Evaluation
from msfusion.width.groups import ShardMap, State, WidthMap, Window
from msfusion.width.shards import Classes, divide
from msfusion.width.slices import plan
from msfusion.width.tensors import state_tensors

if TYPE_CHECKING:
    from msfusion.federated.method import Method, Task, Update

Read = Callable[[Sequence[str]], State]
"""Gives whole tensors of the state by their names, collected from their owners; to be dropped when they were used."""


def itself(name: str) -> str:
    """A tensor is divided as that of its own name."""
    return name


def without_label(name: str) -> str:
    """`block2.layers.0.weight` is divided as `layers.0.weight`."""
    return name.partition(".")[2]


def held_whole(round_index: int, participant: int) -> Window:
    """A participant trains a small model, and holds all of it."""
    return {}


def is_note(name: str) -> bool:
    """Whether a tensor of the state is the method's own note, which every rank has."""
    return name.startswith(".")


@dataclass(frozen=True, eq=False)
class Sharding:
    """What a method tells of itself, for its state to be divided.

    `first` is the state before the first round. `width_map` has the shapes by which it is divided; `base` says which of
    its tensors a tensor of the state is divided like, `base_of_task` (by default the same) one of a task or an update;
    `window` gives the units of a task. `on` makes the method on a shard, from its map and a function that cuts a state
    of the map's names down to it. `carrier` is the method where a participant is, without the weights of the whole:
    nobody needs those of the model from which all was made any more (`hollow`).

    `evaluate` says how good a state is, reading it part by part; it is given the notes. `measure` makes a
    participant's measurement, where that needs the whole model (`Method.measure`): all ranks are at it at the same
    time, those without a participant too (None), and read the same tensors in the same order.
    """

    first: State
    width_map: WidthMap
    on: Callable[[ShardMap, Callable[[State], dict[str, Tensor]]], Method]
    carrier: Method
    evaluate: Callable[[Read, State, Batch], Evaluation]
    window: Callable[[int, int], Window] = held_whole
    base: Callable[[str], str] = itself
    base_of_task: Callable[[str], str] | None = None
    classes: Classes | None = None
    measure: Callable[[Read, tuple[Task, Batch] | None], Update | None] | None = None


@dataclass(frozen=True)
class Form:
    """A tensor that is elsewhere: its type, and its shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes its entries take up."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Shard:
    """What one of several ranks has of a method: its rows of the state, and who has the others."""

    def __init__(self, sharding: Sharding, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self._window, self._base = sharding.window, sharding.base
        self._base_of_task = sharding.base_of_task or sharding.base
        divided = [name for name in sharding.first if not is_note(name)]
        sizes = {sharding.base(name): sharding.first[name].itemsize for name in divided}
        self._division = divide(sharding.width_map, sizes, ranks, sharding.classes)
        self.forms = {name: Form(each.dtype, tuple(each.shape)) for name, each in sharding.first.items()}
        self.first = self.cut(sharding.first)
        self.method = sharding.on(
            self._division.shard_map(rank), lambda state: self._division.shard(state, rank)
        )

    def let_go_of_first(self) -> dict[str, Tensor]:
        """The part for this rank of the state before the first round, which is not kept any longer."""
        first, self.first = self.first, {}
        return first

    def is_divided(self, name: str) -> bool:
        """Whether each rank has some rows of a tensor; else every rank has all of it."""
        return not is_note(name) and self._base(name) in self._division.owners

    def cut(self, state: State) -> dict[str, Tensor]:
        """What this rank has of a whole state; the names of a tied tensor share one copy."""
        made: dict[int, Tensor] = {}
        for name, tensor in state.items():
            if id(tensor) not in made:
                made[id(tensor)] = self.part(name, tensor, self.rank)
        return {name: made[id(tensor)] for name, tensor in state.items()}

    def part(self, name: str, tensor: Tensor, rank: int) -> Tensor:
        """The rows that a rank has of a whole tensor of the state, as a copy."""
        return (
            self._division.part(self._base(name), tensor, rank) if self.is_divided(name) else tensor.clone()
        )

    def rows(self, name: str) -> list[Int[Tensor, " _"]]:
        """The rows of a whole tensor of the state that each rank has."""
        return [self._division.shard_map(rank).owned[self._base(name)] for rank in range(self.ranks)]

    def owner(self, name: str) -> Int[Tensor, " rows"]:
        """The rank that has each row of a tensor of the state."""
        return self._division.owners[self._base(name)]

    def places(self, names: Sequence[str], round_index: int, participant: int) -> Mapping[str, Places]:
        """Of a task's tensors that are divided, which of their rows each rank has."""
        cuts = plan(self._division.width_map, self._window(round_index, participant))
        known: dict[tuple[int, int], Places] = {}
        found: dict[str, Places] = {}
        for name in names:
            base = self._base_of_task(name)
            if base in self._division.owners:
                key = id(cuts[base]), id(self._division.owners[base])
                if key not in known:
                    known[key] = Places(self._division.places(base, cuts[base].rows))
                found[name] = known[key]
        return found

    def payload(self, task: Task) -> int:
        """The bytes of all tensors of a task of which this rank has a part."""
        places = self.places([*task.tensors], task.round_index, task.participant)
        return sum(
            places[name].form(tensor).nbytes if name in places else tensor.nbytes
            for name, tensor in task.tensors.items()
        )

    def stand_ins(self) -> dict[str, Tensor]:
        """The whole state in name, type and shape; of each tensor one number is in memory."""
        return {name: stretched(form) for name, form in self.forms.items()}


@dataclass(frozen=True, eq=False)
class Places:
    """Of the rows of one tensor of a task, by rank, those that the rank has: as places among them, ascending."""

    each: Sequence[Int[Tensor, " _"]]

    @cached_property
    def counts(self) -> list[int]:
        """How many there are."""
        return [*map(len, self.each)]

    def form(self, part: Tensor) -> Form:
        """The form of the whole tensor, of which a part is at hand."""
        return Form(part.dtype, (sum(self.counts), *part.shape[1:]))

    def take(self, tensor: Tensor, rank: int) -> Tensor:
        """A rank's rows of a tensor."""
        places = self.each[rank]
        count = len(places)
        if count and int(places[-1]) - int(places[0]) == count - 1:  # neighbours: no copy
            return tensor[int(places[0]) : int(places[0]) + count]
        return tensor.index_select(0, places)

    def put(self, tensor: Tensor, part: Tensor, rank: int) -> None:
        """Write a rank's rows to their places, the opposite of `take`."""
        tensor.index_copy_(0, self.each[rank], part)


def hollow(model: nn.Module) -> None:
    """Let go of a model's weights, in place: of each tensor one number stays in memory, stretched to its shape.

    The model can still be looked at and copied; who writes into it gets a RuntimeError.
    """
    for tensor in state_tensors(model).values():
        tensor.data = stretched(tensor)


def stretched(tensor: Tensor | Form) -> Tensor:
    """A tensor of that type and shape, with one number in memory."""
    device = tensor.device if isinstance(tensor, Tensor) else None
    return torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
