"""A model divided among several owners, row by row: each entry has one owner, and all own about equally much.

A tensor is divided along axis 0. What one owner has of all tensors is its *shard*, a state with a map of its own
(`groups.ShardMap`): windows mean the same there, so cutting slices (`slices`) and averaging (`msfusion.averaging`)
work on a shard as they do on a whole model, entry by entry.

Where rows are copies of each other (`copies`), all copies of a row have one owner. Tensors without an axis, such as
counters, are whole in every shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from msfusion.width.groups import ShardMap, State, WidthMap
from msfusion.width.slices import check_shape

Classes = Callable[[str], Int[Tensor, " rows"]]
"""For each row of a tensor, by its name, the class that it belongs to: rows of one class have one owner."""


@dataclass(frozen=True, eq=False)
class Division:
    """Who owns which rows of each tensor, by number from 0; `owners` has every name of a tied tensor."""

    width_map: WidthMap
    count: int
    owners: Mapping[str, Int[Tensor, " rows"]]

    def shard_map(self, owner: int) -> ShardMap:
        """The map of an owner's shard."""
        return self._maps[owner]

    @cached_property
    def _maps(self) -> list[ShardMap]:
        return [self._map_of(owner) for owner in range(self.count)]

    def _map_of(self, owner: int) -> ShardMap:
        known: dict[int, tuple[Tensor, Tensor]] = {}  # tensors that are divided alike share their rows
        for owners in self.owners.values():
            if id(owners) not in known:
                owned = (owners == owner).nonzero().flatten()
                numbers = torch.full((len(owners),), -1)
                numbers[owned] = torch.arange(len(owned))
                known[id(owners)] = owned, numbers
        rows = {name: known[id(owners)] for name, owners in self.owners.items()}
        whole = self.width_map
        return ShardMap(
            groups=whole.groups,
            shapes={
                name: (len(rows[name][0]), *shape[1:]) if name in rows else shape
                for name, shape in whole.shapes.items()
            },
            parameters=whole.parameters,
            aliases=whole.aliases,
            contracting=whole.contracting,
            program=whole.program,
            whole=whole,
            owned={name: owned for name, (owned, _) in rows.items()},
            numbers={name: numbers for name, (_, numbers) in rows.items()},
        )

    def part(self, name: str, tensor: Tensor, owner: int) -> Tensor:
        """An owner's rows of a whole tensor, as a copy."""
        if name not in self.owners:
            return tensor.clone()
        return tensor.index_select(0, self.shard_map(owner).owned[name].to(tensor.device))

    def shard(self, state: State, owner: int) -> dict[str, Tensor]:
        """An owner's rows of a whole state; the names of a tied tensor share one copy. Raises MsfusionError."""
        parts: dict[str, Tensor] = {}
        for name, tensor in state.items():
            check_shape(name, tensor, self.width_map)
            first = self.width_map.aliases.get(name, name)
            if first not in parts:
                parts[first] = self.part(name, tensor, owner)
        return {name: parts[self.width_map.aliases.get(name, name)] for name in state}

    def places(self, name: str, rows: Int[Tensor, " held"]) -> list[Int[Tensor, " _"]]:
        """Of some rows of a tensor, in their order, those of each owner, as places among them."""
        owners = self.owners[name][rows]
        return [(owners == owner).nonzero().flatten() for owner in range(self.count)]


def divide(
    width_map: WidthMap, bytes_of: Mapping[str, int], count: int, classes: Classes | None = None
) -> Division:
    """The tensors of a map divided among so many owners, as evenly as whole rows allow, the same for same arguments.

    `bytes_of` says how many bytes an entry of each tensor has. An owner has neighbouring rows (of copies: classes).
    """
    loads = [0] * count
    owners: dict[str, Tensor] = {}
    alike: dict[tuple[int, ...], Tensor] = {}
    for name, shape in width_map.shapes.items():
        first = width_map.aliases.get(name, name)
        if first != name:
            if first in owners:
                owners[name] = owners[first]
        elif shape:
            groups = torch.arange(shape[0]) if classes is None else classes(name)
            number = int(groups.max()) + 1 if len(groups) else 0
            whole, rest = divmod(number, count)
            larger = sorted(range(count), key=lambda owner: (loads[owner], owner))[:rest]
            lengths = torch.tensor([whole + (owner in larger) for owner in range(count)])
            of_rows = torch.repeat_interleave(torch.arange(count), lengths)[groups]
            owners[name] = alike.setdefault(tuple(of_rows.tolist()), of_rows)
            row_bytes = bytes_of[name] * torch.Size(shape[1:]).numel()
            for owner, rows in enumerate(torch.bincount(of_rows, minlength=count).tolist()):
                loads[owner] += rows * row_bytes
    return Division(width_map, count, owners)
