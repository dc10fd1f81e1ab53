"""Tensors end to end as bytes, and back: both sides know the forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

from msfusion.engines.sharded.ranks import Ranks
from msfusion.errors import TrainingError
from msfusion.federated.sharding import Form, Places, Shard
from msfusion.width.groups import State


def joined(tensors: State) -> UInt8[Tensor, " bytes"]:
    """The bytes of tensors, those with the longest entries first: so each begins at a multiple of its entries' size."""
    parts = [tensors[name] for name in _in_order({name: each.dtype for name, each in tensors.items()})]
    flat = [part.detach().contiguous().reshape(-1).view(torch.uint8) for part in parts]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)


def parted(flat: UInt8[Tensor, " bytes"], forms: Mapping[str, Form]) -> dict[str, Tensor]:
    """The opposite of `joined`: views of the bytes. Raises TrainingError where their number is wrong."""
    if len(flat) != size_of(forms):
        raise TrainingError(f"a rank has sent {len(flat)} bytes where {size_of(forms)} should be")
    found: dict[str, Tensor] = {}
    cursor = 0
    for name in _in_order({name: form.dtype for name, form in forms.items()}):
        form = forms[name]
        found[name] = flat[cursor : cursor + form.nbytes].view(form.dtype).view(form.shape)
        cursor += form.nbytes
    return {name: found[name] for name in forms}


def size_of(forms: Mapping[str, Form]) -> int:
    """How many bytes tensors of these forms are."""
    return sum(form.nbytes for form in forms.values())


def _in_order(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    return sorted(dtypes, key=lambda name: -dtypes[name].itemsize)


def put_together(
    ranks: Ranks, places: Mapping[str, Places], tensors: State, at: int
) -> dict[str, Tensor] | None:
    """The tensors of a task or an update, from the rows that each rank has, at one rank; None at the others."""
    divided = {name: tensor for name, tensor in tensors.items() if name in places}
    if ranks.rank != at:
        ranks.exchange({at: joined(divided)}, {})
        return None
    forms = [forms_at(rank, places, forms_of(divided)) for rank in range(ranks.count)]
    others = [rank for rank in range(ranks.count) if rank != at]
    return from_rows(ranks.exchange({}, {rank: size_of(forms[rank]) for rank in others}), places, tensors, at)


def from_rows(
    received: dict[int, Tensor], places: Mapping[str, Places], own: State, rank: int
) -> dict[str, Tensor]:
    """Whole tensors from a rank's own rows and those that it has received of the others, which are let go of."""
    forms = forms_of({name: own[name] for name in places if name in own})
    whole = {
        name: torch.empty(places[name].form(each).shape, dtype=each.dtype) if name in forms else each
        for name, each in own.items()
    }
    for other in [rank, *received]:
        rows = own if other == rank else parted(received.pop(other), forms_at(other, places, forms))
        for name in forms:
            places[name].put(whole[name], rows[name], other)
    return whole


def forms_of(tensors: State) -> dict[str, Form]:
    """The forms of some tensors."""
    return {name: Form(each.dtype, tuple(each.shape)) for name, each in tensors.items()}


def forms_at(rank: int, places: Mapping[str, Places], own: Mapping[str, Form]) -> dict[str, Form]:
    """The forms of the rows that a rank has, from those of one's own rows."""
    return {
        name: Form(form.dtype, (places[name].counts[rank], *form.shape[1:]))
        for name, form in own.items()
        if name in places
    }


def dtype_named(name: str) -> torch.dtype:
    """A type of tensors by its name. Raises TrainingError where there is none."""
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise TrainingError(f"a rank tells of a tensor of type {name}, which is none of PyTorch's")
    return found


def collected(
    ranks: Ranks, shard: Shard, state: State, names: Sequence[str], *, everywhere: bool = False
) -> dict[str, Tensor]:
    """Whole tensors of the state, from the parts that ranks have: at the first rank, or everywhere. Others get nothing.

    All ranks call it at the same time, with the same names.
    """
    divided = [name for name in names if shard.is_divided(name)]
    rows = {name: shard.rows(name) for name in divided}
    own = joined({name: state[name] for name in divided})
    here = everywhere or ranks.is_first
    readers = range(ranks.count) if everywhere else range(1)

    def forms(rank: int) -> dict[str, Form]:
        return {
            name: Form(state[name].dtype, (len(rows[name][rank]), *state[name].shape[1:])) for name in divided
        }

    others = [rank for rank in range(ranks.count) if rank != ranks.rank]
    incoming = {rank: size_of(forms(rank)) for rank in others} if here else {}
    received = ranks.exchange({rank: own for rank in readers if rank != ranks.rank}, incoming)
    if not here:
        return {}
    found = {name: state[name] for name in names}
    for name in divided:
        found[name] = state[name].new_empty((len(shard.owner(name)), *state[name].shape[1:]))
    for rank in range(ranks.count):
        parts = (
            {name: state[name] for name in divided}
            if rank == ranks.rank
            else parted(received.pop(rank), forms(rank))
        )
        for name, part in parts.items():
            found[name].index_copy_(0, rows[name][rank], part)
    return found


def scattered(ranks: Ranks, shard: Shard, name: str, form: Form, read: Callable[[], Tensor]) -> Tensor:
    """The part for this rank of a tensor of the state that the first one reads; all ranks call it at the same time."""
    if not shard.is_divided(name):
        sizes = {} if ranks.is_first else {0: form.nbytes}
        whole = read() if ranks.is_first else None
        sent = {} if whole is None else dict.fromkeys(range(1, ranks.count), joined({name: whole}))
        received = ranks.exchange(sent, sizes)
        return whole if whole is not None else parted(received[0], {name: form})[name].clone()
    rows = shard.rows(name)
    if ranks.is_first:
        whole = read()
        ranks.exchange(
            {rank: joined({name: whole.index_select(0, rows[rank])}) for rank in range(1, ranks.count)}, {}
        )
        return whole.index_select(0, rows[0])
    own = Form(form.dtype, (len(rows[ranks.rank]), *form.shape[1:]))
    return parted(ranks.exchange({}, {0: own.nbytes})[0], {name: own})[name]
