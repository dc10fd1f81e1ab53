"""Tensors of a model that share memory without being one tensor: `b.weight = nn.Parameter(a.weight.data)`.

A step that trains or writes one of them changes the other too. Sub-models hold copies of both, which drift apart. Ties
of a model are known by the tensor that has two names; shared memory is no tie, so it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from msfusion.errors import UntraceableModelError
from msfusion.width.answers import written_tensors
from msfusion.width.graph import Program


def check_memory(program: Program) -> None:
    """Raise UntraceableModelError, naming both, where tensors share memory and one of them is trained or written.

    Views of one memory that do not overlap (flattened weights) are allowed. So is memory that is only read: what is
    frozen is noted in `program.frozen_together`, to be refused if it is trained after all.
    """
    written = {name for graph in program.graphs.values() for name in written_tensors(graph)}
    names = {id(tensor): name for name, tensor in reversed(list(program.tensors().items()))}
    tensors = {name: tensor for name, tensor in program.tensors().items() if names[id(tensor)] == name}
    for one, two in _overlapping(tensors):
        if not written.isdisjoint((one, two)):
            raise shared(program.model, one, two)
        program.frozen_together.append((one, two))
    check_still_frozen(program, program.model, tensors)


def check_still_frozen(program: Program, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Raise UntraceableModelError where a tensor is trained that shares its memory with another."""
    for one, two in program.frozen_together:
        if any(name in state and state[name].requires_grad for name in (one, two)):
            raise shared(model, one, two)


def shared(model: nn.Module, one: str, two: str) -> UntraceableModelError:
    """The error that names both tensors, and what to do."""
    return UntraceableModelError(
        f"{type(model).__name__} cannot be traced: {one!r} and {two!r} share memory, so that a step on one changes the "
        "other, but they are two tensors, of which sub-models hold two copies: make them one nn.Parameter "
        "(decoder.weight = encoder.weight, with .t() in forward), or clone() one of them"
    )


def _overlapping(tensors: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """The pairs of tensors that have an entry in common."""
    ranges: dict[tuple[object, ...], list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if (place := _range(tensor)) is not None:
            memory, start, stop = place
            ranges.setdefault(memory, []).append((start, stop, name))
    for found in ranges.values():
        found.sort()
        near: list[tuple[int, int, str]] = []  # what may reach into the next range
        for start, stop, name in found:
            near = [other for other in near if other[1] > start]
            for _, _, other in near:
                if _have_common_entry(tensors[other], tensors[name]):
                    yield other, name
            near.append((start, stop, name))


def _range(tensor: Tensor) -> tuple[tuple[object, ...], int, int] | None:
    """In which memory a tensor lies, its first byte and the one after its last; None where it has none of its own."""
    try:
        if tensor.layout is not torch.strided or not tensor.numel():
            return None
        address = _first_byte(tensor)
        storage = tensor.untyped_storage()._cdata if tensor.is_meta else 0
    except (RuntimeError, NotImplementedError):  # a tensor that wraps others
        return None
    if not address and not tensor.is_meta:
        return None
    return (tensor.device, storage), address, address + _span(tensor) * tensor.itemsize


def _span(tensor: Tensor) -> int:
    """The number of entries from a tensor's first to its last in memory."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _have_common_entry(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors whose ranges in memory overlap have an entry in common (columns may alternate)."""
    if all(tensor.numel() == _span(tensor) for tensor in (one, two)) or one.itemsize != two.itemsize:
        return True
    starts = [_first_byte(tensor) for tensor in (one, two)]
    first = min(starts)
    if any((start - first) % one.itemsize for start in starts):
        return True
    one_entries, two_entries = (
        _entries(tensor, (start - first) // one.itemsize)
        for tensor, start in zip((one, two), starts, strict=True)
    )
    return bool(torch.isin(one_entries, two_entries).any())


def _first_byte(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.itemsize if tensor.is_meta else tensor.data_ptr()


def _entries(tensor: Tensor, offset: int) -> Tensor:
    """The number of every entry in memory, from the first of two tensors."""
    return (
        (torch.arange(_span(tensor), device="cpu") + offset)
        .as_strided(tensor.shape, tensor.stride())
        .flatten()
    )


__all__ = ["check_memory", "check_still_frozen"]
